"""Draw masks on images and split texts at their spans, in one set of colours."""

import base64
import colorsys
import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from plum_partonomy.images import to_rgb
from plum_partonomy.masks import RLE, decode
from plum_partonomy.scoring.predictions import SpanMask

__all__ = ["data_address", "draw_named_masks", "highlight", "mask_opacity", "overlay", "panel", "pick_colours"]

# Distinct on photographs and for colour-blind readers (after Okabe and Ito), dark enough for white text.
COLOURS = (
    "#0072b2",
    "#c44e00",
    "#00815e",
    "#b8378a",
    "#6a51a3",
    "#8c6d00",
    "#b2182b",
    "#3f6f8c",
    "#4d7c0f",
    "#7b4b2a",
)
PANEL_SIZE = 288  # longest side of an image on the page, in pixels
NAMED_SIDE = 512  # least longest side of an image with names beside it, in pixels


def pick_colours(count: int) -> list[str]:
    """Return distinct colours as "#rrggbb", always in the same order, dark enough for white text."""
    further = []
    for number in range(count - len(COLOURS)):
        hue = (0.03 + number * 0.618034) % 1  # golden ratio steps never repeat a hue
        rgb = colorsys.hls_to_rgb(hue, 0.16 + 0.05 * (number % 3), 0.7)
        further.append("#{:02x}{:02x}{:02x}".format(*(round(255 * part) for part in rgb)))
    return [*COLOURS[:count], *further]


def overlay(image: Image.Image, masks: Sequence[np.ndarray], *, colours: Sequence[str] | None = None) -> Image.Image:
    """Return the image with each mask filled translucently and outlined.

    Args:
        image: PIL image of any mode; left unchanged.
        masks: bool arrays of the image's (height, width), drawn in order.
        colours: "#rrggbb" per mask; default: `pick_colours`.

    Returns:
        A new RGB image of the same size.

    Raises:
        ValueError: a mask is not of the image's size.
    """
    drawn = to_rgb(image, where="image")
    colours = colours or pick_colours(len(masks))
    for index, mask in enumerate(masks):
        if mask.shape != (image.height, image.width):
            raise ValueError(
                f"Expected masks of the image's (height, width) {(image.height, image.width)}, found {mask.shape} "
                f"for mask {index}: resize the mask to the image."
            )
        drawn.paste(colours[index], mask=Image.fromarray(mask_opacity(mask)))
    return drawn


def draw_named_masks(
    image: Image.Image, masks: Sequence[np.ndarray], names: Sequence[str], *, colours: Sequence[str] | None = None
) -> Image.Image:
    """Return the overlay with the name of each mask on the right, connected by a line.

    Args:
        image: PIL image of any mode; enlarged where its longer side has less than NAMED_SIDE pixels.
        masks: bool arrays of the image's (height, width). Those without a pixel have a name and no line.
        names: one per mask.
        colours: "#rrggbb" per mask; default: `pick_colours`.
    """
    colours = colours or pick_colours(len(masks))
    scale = max(1.0, NAMED_SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    text = max(13, max(size) // 40)
    font = ImageFont.load_default(text)
    enlarged = [np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks]
    drawn = overlay(to_rgb(image, where="image").resize(size, Image.Resampling.BICUBIC), enlarged, colours=colours)
    widest = max((round(font.getlength(name)) for name in names), default=0)
    step = round(1.7 * text)
    page = Image.new("RGB", (size[0] + widest + 4 * text, max(size[1], step * len(masks))), "white")
    page.paste(drawn)
    places = [_inner_point(mask) for mask in enlarged]
    order = sorted(range(len(masks)), key=lambda index: (places[index] or (0, size[1]))[1])
    draw, x = ImageDraw.Draw(page), size[0] + 2 * text
    tops = _spread([(places[index] or (0, size[1]))[1] - step // 2 for index in order], step, page.height)
    for index, top in zip(order, tops, strict=True):
        middle = top + step // 2
        if places[index] is not None:
            draw.line([places[index], (x - text // 2, middle)], fill="white", width=4)
            draw.line([places[index], (x - text // 2, middle)], fill=colours[index], width=2)
        box = (x - text // 2, top + 2, x + round(font.getlength(names[index])) + text // 2, top + step - 2)
        draw.rounded_rectangle(box, text // 4, fill=colours[index])
        draw.text((x, middle), names[index], fill="white", font=font, anchor="lm")
    return page


def _inner_point(mask: np.ndarray) -> tuple[int, int] | None:
    """Return the (x, y) of the pixel in the middle of the mask's longest row, or None for an empty mask."""
    if not mask.any():
        return None
    y = int(mask.sum(axis=1).argmax())
    columns = np.flatnonzero(mask[y])
    return int(columns[len(columns) // 2]), y


def _spread(tops: Sequence[int], step: int, height: int) -> list[int]:
    """Return the places in order, moved apart by at least `step`, within the height if there is room."""
    moved: list[int] = []
    for top in tops:
        moved.append(max(top, moved[-1] + step if moved else 0))
    limit = height - step
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - step
    return moved


def mask_opacity(mask: np.ndarray) -> np.ndarray:
    """Return the opacity of a drawn mask, uint8 0..255: translucent inside, opaque along its edge."""
    area = Image.fromarray(mask.astype(np.uint8) * 255)
    inside = area.filter(ImageFilter.MinFilter(3))
    edge = np.asarray(area) > np.asarray(inside)
    return np.where(edge, 255, np.where(mask, 140, 0)).astype(np.uint8)


def highlight(
    text: str, spans: Sequence[SpanMask], *, colours: Sequence[str] | None = None
) -> list[tuple[str, str | None]]:
    """Split a text at its spans: (piece, colour of its mask or None), in order; the joined pieces are the text."""
    colours = colours or pick_colours(len(spans))
    pieces, position = [], 0
    for index in sorted(range(len(spans)), key=lambda index: spans[index].start):
        span = spans[index]
        pieces.append((text[position : span.start], None))
        pieces.append((text[span.start : span.end], colours[index]))
        position = span.end
    pieces.append((text[position:], None))
    return [piece for piece in pieces if piece[0]]


def panel(image: Image.Image, rles: Iterable[RLE], colours: Sequence[str]) -> str:
    """Return the overlay at page size as a data address for an HTML page."""
    scale = PANEL_SIZE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    masks = [Image.fromarray(decode(rle, expected_size=(image.height, image.width))) for rle in rles]
    masks = [np.asarray(mask.convert("L").resize(size, Image.Resampling.BILINEAR)) > 127 for mask in masks]
    drawn = overlay(to_rgb(image, where="image").resize(size, Image.Resampling.BICUBIC), masks, colours=colours)
    content = io.BytesIO()
    drawn.save(content, format="JPEG", quality=82)
    return data_address(content, kind="jpeg")


def data_address(content: io.BytesIO, *, kind: str) -> str:
    """Return an image file, `kind` "jpeg" or "png", as a data address for an HTML page."""
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
