"""Draw pictures of objects with optional parts, and exact masks of the visible parts.

    seed, split, index --> class, parts present, pose, colours --> RGB canvas + id canvas --> image, visible masks

Each picture depends only on (seed, split, index), so splits share no picture and any range of indices can be drawn in
any order or process. Both canvases are SUPERSAMPLING times larger. The image is averaged down; a mask pixel belongs to
the part that covers its centre. An occluder may hide some of the object. A part with fewer than MIN_VISIBLE_PIXELS
visible pixels is drawn again elsewhere or removed; no part is drawn without an annotation.
"""

import colorsys
import io
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from plum_partonomy.drawn.hard_objects import HARD_COLOURS, HARD_FAMILIES
from plum_partonomy.drawn.objects import COLOURS, FAMILIES, Colour, Part
from plum_partonomy.masks import encode
from plum_partonomy.records import PartExample, PartMask
from plum_partonomy.seeding import seeded_generator

SUPERSAMPLING = 3
NOISE = 2.0
WEBP_QUALITY = 85
LICENCE = "Apache-2.0"
DEFAULT_SEED = 0

_POSES_PER_PART_SET = 8


@dataclass(frozen=True)
class Scene:
    """
    How the pictures of a set are drawn. Lengths are in image pixels; ranges are (lowest, highest).

    Attributes:
        families: Family -> label -> parts from back to front.
        image_size: Side of the square image.
        min_visible_pixels: Minimum number of visible pixels of a part.
        scale: Half the extent of the object, as a share of half the image.
        rotation: Maximum rotation in degrees.
        occluded: Share of the pictures with an occluder in front of the object.
        occluders: Number of occluders, of radius `occluder_radius`.
        second_object: Whether a smaller object of another kind, which belongs to no part, is drawn beside it.
    """

    name: str
    families: dict[str, dict[str, tuple[Part, ...]]]
    colours: dict[str, Colour]
    image_size: int = 128
    min_visible_pixels: int = 25
    scale: tuple[float, float] = (0.78, 0.94)
    rotation: float = 10.0
    occluded: float = 0.3
    occluders: tuple[int, int] = (1, 1)
    occluder_radius: tuple[float, float] = (4, 9)
    second_object: bool = False

    @property
    def objects(self) -> dict[str, tuple[Part, ...]]:
        return {label: parts for family in self.families.values() for label, parts in family.items()}

    @property
    def canvas(self) -> int:
        return self.image_size * SUPERSAMPLING


MINI = Scene(name="mini", families=FAMILIES, colours=COLOURS)
HARD = Scene(
    name="mini_hard",
    families=HARD_FAMILIES,
    colours=HARD_COLOURS,
    image_size=256,
    min_visible_pixels=60,
    scale=(0.58, 0.76),
    rotation=20.0,
    occluded=0.9,
    occluders=(1, 4),
    occluder_radius=(8, 22),
    second_object=True,
)


@dataclass
class Drawing:
    """An RGB image and, for each drawn instance, its part name and visible mask: bool `(image_size, image_size)`."""

    image: Image.Image
    names: list[str]
    masks: list[np.ndarray]


def part_graph(scene: Scene = MINI) -> dict[str, list[str]]:
    """Return all parts that an object of each label can have, sorted."""
    return {label: sorted(part.name for part in parts) for label, parts in scene.objects.items()}


def required_parts(scene: Scene = MINI) -> dict[str, list[str]]:
    """Return the parts that every object of each label has, sorted."""
    return {label: sorted(part.name for part in parts if part.required) for label, parts in scene.objects.items()}


def presence(scene: Scene = MINI) -> dict[str, dict[str, float]]:
    """Return the share of the drawings of each label that have each part, before occlusion."""
    return {label: {part.name: part.presence for part in parts} for label, parts in scene.objects.items()}


def instance_graph(scene: Scene = MINI) -> dict[str, list[str]]:
    """Return the labels of each family."""
    return {family: list(objects) for family, objects in scene.families.items()}


def encode_image(image: Image.Image) -> dict[str, Any]:
    """Return the image as stored by `datasets.Image`. The encoding is lossy, so compare decoded images only."""
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=WEBP_QUALITY)
    return {"bytes": buffer.getvalue(), "path": None}


def draw_example(split: str, index: int, *, scene: Scene = MINI, seed: int = DEFAULT_SEED) -> PartExample:
    """Draw one object. Each visible part has one mask, the union of its instances. Parts are sorted by name."""
    rng = seeded_generator(seed, scene.name, split, index)
    label = _draw_label(index, scene)
    drawing = _draw(label, _draw_parts(label, scene, rng), scene, rng)
    united: dict[str, np.ndarray] = {}
    for name, mask in zip(drawing.names, drawing.masks, strict=True):
        united[name] = united[name] | mask if name in united else mask
    masks = [PartMask(name, encode(united[name])) for name in sorted(united)]
    return PartExample(drawing.image, f"{scene.name}-{split}-{index:05d}", label, masks, scene.name, LICENCE)


def draw_instances_example(split: str, index: int, *, seed: int = DEFAULT_SEED) -> PartExample:
    """Draw one object with parts that occur several times. Each instance has a separate mask, so labels repeat.

    Two to all instances of such a part are drawn, each visible and separate from the others.
    """
    rng = seeded_generator(seed, "mini_instances", split, index)
    label = _draw_label(index, MINI)
    repeated = False
    while not repeated:
        drawn = _draw_parts(label, MINI, rng, some_instances=True)
        if any(len(part.instances) > 1 for part in drawn):
            drawing = _draw(label, drawn, MINI, rng, each_instance=True)
            repeated = len(set(drawing.names)) < len(drawing.names)
    masks = [PartMask(name, encode(mask)) for name, mask in zip(drawing.names, drawing.masks, strict=True)]
    return PartExample(drawing.image, f"mini_instances-{split}-{index:05d}", label, masks, MINI.name, LICENCE)


def _draw_label(index: int, scene: Scene) -> str:
    """Return the label of an index; labels alternate, so every split is balanced."""
    return list(scene.objects)[index % len(scene.objects)]


def _draw_parts(label: str, scene: Scene, rng: np.random.Generator, *, some_instances: bool = False) -> list[Part]:
    """Return the parts of one drawing; `some_instances` keeps two to all instances of repeated parts."""
    drawn = []
    for part in scene.objects[label]:
        if part.required or rng.random() < part.presence:
            drawn.append(_with_some_instances(part, rng) if some_instances else part)
    return drawn


def _with_some_instances(part: Part, rng: np.random.Generator) -> Part:
    if len(part.instances) == 1:
        return part
    count = int(rng.integers(2, len(part.instances) + 1))
    kept = sorted(rng.choice(len(part.instances), count, replace=False).tolist())
    return replace(part, instances=tuple(part.instances[position] for position in kept))


def _draw(
    label: str, parts: list[Part], scene: Scene, rng: np.random.Generator, *, each_instance: bool = False
) -> Drawing:
    """Draw the parts in new poses until each is visible; parts that stay hidden in every pose are removed.

    A part is visible if one instance is. With `each_instance`, all instances must be visible and none may touch
    another.
    """

    def is_visible(name: str) -> bool:
        return _is_visible(name, drawing, least=scene.min_visible_pixels, each_instance=each_instance)

    while True:
        for _ in range(_POSES_PER_PART_SET):
            drawing = _draw_once(label, parts, scene, rng)
            hidden = {part.name for part in parts if not is_visible(part.name)}
            if not hidden:
                return drawing
        parts = [part for part in parts if part.name not in hidden]


def _is_visible(name: str, drawing: Drawing, *, least: int, each_instance: bool) -> bool:
    masks = [mask for other, mask in zip(drawing.names, drawing.masks, strict=True) if other == name]
    large = [mask.sum() >= least for mask in masks]
    if not each_instance:
        return any(large)
    grown = sum(ndimage.binary_dilation(mask, structure=np.ones((3, 3))).astype(int) for mask in masks)
    touching = any((mask & (grown > 1)).any() for mask in masks)
    return all(large) and not touching


def _draw_once(label: str, parts: list[Part], scene: Scene, rng: np.random.Generator) -> Drawing:
    canvas = _background(scene, rng)
    ids = Image.new("L", canvas.size, 0)
    pens = ImageDraw.Draw(canvas), ImageDraw.Draw(ids)
    in_front = scene.second_object and rng.random() < 0.3
    if scene.second_object and not in_front:
        _draw_second_object(pens, label, scene, rng)
    frame = _random_frame(scene, rng)
    names: list[str] = []
    for part in parts:
        colour = _part_colour(part, scene, rng)
        jittered = _jitter(part, rng)
        for instance in jittered:
            names.append(part.name)
            for points, shade in instance:
                _fill(pens, points @ frame[:2] + frame[2], colour * shade, len(names))
    if in_front:
        _draw_second_object(pens, label, scene, rng)
    if rng.random() < scene.occluded:
        lowest, highest = scene.occluders
        for _ in range(lowest if lowest == highest else int(rng.integers(lowest, highest + 1))):
            _occlude(pens, scene, rng)
    pixels = np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32)
    pixels = pixels * rng.uniform(0.88, 1.1) + rng.normal(0, NOISE, pixels.shape)
    centre = SUPERSAMPLING // 2
    id_map = np.asarray(ids)[centre::SUPERSAMPLING, centre::SUPERSAMPLING]
    masks = [id_map == number for number in range(1, len(names) + 1)]
    return Drawing(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), names, masks)


def _draw_second_object(
    pens: tuple[ImageDraw.ImageDraw, ...], label: str, scene: Scene, rng: np.random.Generator
) -> None:
    """Draw a smaller object of another kind near a corner. It belongs to no part and hides what is behind it."""
    others = [other for other in scene.objects if other != label]
    half = scene.canvas / 2
    frame = _random_frame(scene, rng)
    frame[:2] *= rng.uniform(0.4, 0.6)
    frame[2] = half + rng.choice([-1.0, 1.0], 2) * half * rng.uniform(0.5, 0.75, 2)
    for part in _draw_parts(others[rng.integers(len(others))], scene, rng):
        colour = _part_colour(part, scene, rng)
        for instance in _jitter(part, rng):
            for points, shade in instance:
                _fill(pens, points @ frame[:2] + frame[2], colour * shade, 0)


def _random_frame(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Return an affine map from object to canvas coordinates: the images of x and y, and the translation, as rows."""
    half = scene.canvas / 2
    scale = half * rng.uniform(*scene.scale)
    angle = math.radians(rng.uniform(-scene.rotation, scene.rotation))
    flip = rng.choice([-1.0, 1.0])
    aspect = rng.uniform(0.9, 1.1)
    slack = half - scale
    x_axis = scale * flip * min(aspect, 1.0) * np.array([math.cos(angle), math.sin(angle)])
    y_axis = scale / max(aspect, 1.0) * np.array([-math.sin(angle), math.cos(angle)])
    return np.stack([x_axis, y_axis, half + rng.uniform(-slack, slack, 2)])


def _jitter(part: Part, rng: np.random.Generator) -> list[list[tuple[np.ndarray, float]]]:
    """Return, per instance, the points (N, 2) and shade of each shape, with the part slightly moved and resized."""
    centre = np.mean([point for instance in part.instances for shape in instance for point in shape.points], axis=0)
    stretch = rng.uniform(0.93, 1.08, 2)
    offset = centre * (1 - stretch) + rng.uniform(-0.025, 0.025, 2)
    return [
        [(np.array(shape.points) * stretch + offset, shape.shade) for shape in instance] for instance in part.instances
    ]


def _part_colour(part: Part, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    if part.name in scene.colours:
        return np.array(scene.colours[part.name]) * rng.uniform(0.85, 1.1) + rng.normal(0, 9, 3)
    return 255 * np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.15, 0.75), rng.uniform(0.5, 0.95)))


def _fill(pens: tuple[ImageDraw.ImageDraw, ...], points: np.ndarray, colour: np.ndarray, number: int) -> None:
    """Fill an outlined polygon on both canvases; the outline belongs to the shape."""
    corners = points.ravel().tolist()
    closed = corners + corners[:4]
    for pen, fill, outline in zip(pens, (_rgb(colour), number), (_rgb(colour * 0.55), number), strict=True):
        pen.polygon(corners, fill=fill)
        pen.line(closed, fill=outline, width=2)


def _background(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Return a muted gradient with a few faint shapes."""
    corners = rng.uniform(90, 215) + rng.normal(0, 14, (2, 2, 3))
    canvas = Image.fromarray(corners.clip(0, 255).astype(np.uint8)).resize(
        (scene.canvas, scene.canvas), Image.Resampling.BILINEAR
    )
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(0, 4)):
        pen.polygon(
            _blob(scene, rng, radius=rng.uniform(8, 22)), fill=_rgb(corners.mean((0, 1)) + rng.normal(0, 28, 3))
        )
    return canvas


def _occlude(pens: tuple[ImageDraw.ImageDraw, ...], scene: Scene, rng: np.random.Generator) -> None:
    """Draw a small leaf-like shape in front of the object; it belongs to no part."""
    corners = _blob(scene, rng, radius=rng.uniform(*scene.occluder_radius))
    pens[0].polygon(corners, fill=_rgb(np.array([70, 105, 60]) * rng.uniform(0.7, 1.3)))
    pens[1].polygon(corners, fill=0)


def _blob(scene: Scene, rng: np.random.Generator, *, radius: float) -> list[float]:
    """Return the corners of a random polygon on the canvas; `radius` is in image pixels."""
    angles = np.sort(rng.uniform(0, 2 * math.pi, 6))
    radii = radius * SUPERSAMPLING * rng.uniform(0.6, 1.0, 6)
    x, y = rng.uniform(0.1, 0.9, 2) * scene.canvas
    return np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], axis=1).ravel().tolist()


def _rgb(colour: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = colour.clip(0, 255).astype(int).tolist()
    return red, green, blue
