"""What the miniature draws: twelve kinds of object, each a list of parts from back to front.

Coordinates are in the object's own frame: x to the right and y down, both within [-1, 1], the object facing right.
A part holds one or more instances (four windows, two wheels), an instance one or more shapes (a tyre and its hub).
Required parts are always drawn, optional ones about every second time, so that an answer must be read from the image.
"""

import math
from dataclasses import dataclass

Point = tuple[float, float]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Shape:
    """A filled polygon; `shade` multiplies the part's colour."""

    points: tuple[Point, ...]
    shade: float = 1.0


Instance = tuple[Shape, ...]


@dataclass(frozen=True)
class Part:
    name: str
    instances: tuple[Instance, ...]
    required: bool = False


def _polygon(*points: Point, shade: float = 1.0) -> Shape:
    return Shape(points, shade)


def _box(left: float, top: float, right: float, bottom: float, *, shade: float = 1.0) -> Shape:
    return Shape(((left, top), (right, top), (right, bottom), (left, bottom)), shade)


def _ellipse(x: float, y: float, radius_x: float, radius_y: float | None = None, *, shade: float = 1.0) -> Shape:
    radius_y = radius_x if radius_y is None else radius_y
    angles = [2 * math.pi * step / 20 for step in range(20)]
    return Shape(tuple((x + radius_x * math.cos(a), y + radius_y * math.sin(a)) for a in angles), shade)


def _bar(start: Point, end: Point, width: float, *, shade: float = 1.0) -> Shape:
    (x0, y0), (x1, y1) = start, end
    scale = width / 2 / math.hypot(x1 - x0, y1 - y0)
    dx, dy = -(y1 - y0) * scale, (x1 - x0) * scale
    return Shape(((x0 + dx, y0 + dy), (x1 + dx, y1 + dy), (x1 - dx, y1 - dy), (x0 - dx, y0 - dy)), shade)


def _required(name: str, *shapes: Shape) -> Part:
    return Part(name, (shapes,), required=True)


def _single(name: str, *shapes: Shape) -> Part:
    return Part(name, (shapes,))


def _several(name: str, *instances: Shape | Instance) -> Part:
    return Part(name, tuple((item,) if isinstance(item, Shape) else item for item in instances))


def _wheel(x: float, y: float, radius: float) -> Instance:
    return _ellipse(x, y, radius), _ellipse(x, y, radius * 0.45, shade=2.6)


def _gear(x: float, top: float, bottom: float, radius: float) -> Instance:
    return (_bar((x, top), (x, bottom), 0.06, shade=1.8), *_wheel(x, bottom, radius))


def _flag(x: float, foot: float, top: float, length: float) -> Part:
    cloth = _polygon((x, top), (x + length, top + 0.13), (x, top + 0.27))
    return _single("flag", _bar((x, foot), (x, top - 0.02), 0.045, shade=0.55), cloth)


def _ladder(start: Point, end: Point) -> Part:
    (x0, y0), (x1, y1) = start, end
    rungs = [(x0 + (x1 - x0) * step, y0 + (y1 - y0) * step) for step in (0.08, 0.29, 0.5, 0.71, 0.92)]
    rails = [_bar((x0, y0 + offset), (x1, y1 + offset), 0.05) for offset in (-0.07, 0.07)]
    return _single("ladder", *[_bar((x, y - 0.07), (x, y + 0.07), 0.05, shade=0.8) for x, y in rungs], *rails)


def _stripe(*points: Point) -> Part:
    return _single("stripe", _polygon(*points))


def _drawer(left: float, top: float, right: float, bottom: float) -> Instance:
    knob = _ellipse((left + right) / 2, (top + bottom) / 2, 0.045, shade=0.45)
    return _box(left, top, right, bottom), knob


def _book(left: float, top: float, shade: float) -> Instance:
    return (_box(left, top, left + 0.11, 0.0, shade=shade),)


AIRCRAFT = {
    "passenger jet": (
        _single("tail fin", _polygon((-0.94, -0.64), (-0.7, -0.64), (-0.42, -0.14), (-0.84, -0.1))),
        _several("landing gear", _gear(-0.66, 0.1, 0.36, 0.11), _gear(0.56, 0.1, 0.36, 0.11)),
        _single("antenna", _polygon((0.2, -0.18), (0.27, -0.5), (0.36, -0.5), (0.38, -0.18))),
        _required(
            "fuselage",
            _polygon(
                (-0.98, -0.12),
                (-0.85, -0.21),
                (0.6, -0.23),
                (0.82, -0.15),
                (0.97, 0.02),
                (0.88, 0.14),
                (0.65, 0.2),
                (-0.6, 0.2),
                (-0.9, 0.02),
            ),
        ),
        _stripe((-0.78, 0.06), (0.9, 0.06), (0.84, 0.15), (-0.66, 0.15)),
        _several("window", *[_ellipse(x, -0.08, 0.075) for x in (-0.6, -0.36, -0.12, 0.12)]),
        _single("door", _box(0.3, -0.17, 0.46, 0.15), _box(0.33, -0.12, 0.43, -0.01, shade=1.35)),
        _required("wing", _polygon((0.2, 0.06), (-0.16, 0.06), (-0.56, 0.64), (-0.32, 0.64))),
    ),
    "biplane": (
        _single("tail fin", _polygon((-0.97, -0.52), (-0.75, -0.56), (-0.55, -0.1), (-0.94, -0.04))),
        _several("landing gear", _gear(0.18, 0.1, 0.55, 0.13), _gear(0.54, 0.1, 0.55, 0.13)),
        _flag(-0.24, -0.1, -0.78, -0.36),
        _required(
            "fuselage",
            _polygon(
                (-0.96, -0.09),
                (0.1, -0.2),
                (0.7, -0.2),
                (0.81, -0.05),
                (0.78, 0.12),
                (0.6, 0.2),
                (-0.3, 0.17),
                (-0.96, 0.05),
            ),
        ),
        _stripe((-0.86, -0.05), (-0.1, -0.09), (-0.1, 0.04), (-0.86, 0.02)),
        _single("cockpit", _polygon((-0.16, -0.16), (-0.08, -0.37), (0.1, -0.37), (0.06, -0.18))),
        _required(
            "wing",
            _bar((0.36, -0.56), (0.36, -0.16), 0.06, shade=0.6),
            _box(0.0, -0.68, 0.74, -0.54),
            _box(-0.04, 0.2, 0.7, 0.33),
        ),
        _single("propeller", _ellipse(0.88, -0.04, 0.06, 0.46), _ellipse(0.87, -0.04, 0.09, shade=0.5)),
    ),
    "helicopter": (
        _single("tail fin", _polygon((-0.99, -0.5), (-0.8, -0.5), (-0.62, -0.08), (-0.9, -0.05))),
        _required(
            "fuselage",
            _polygon((-0.2, -0.12), (-0.96, -0.13), (-0.96, -0.02), (-0.2, 0.2)),
            _ellipse(0.16, 0.08, 0.5, 0.37),
        ),
        _stripe((-0.28, 0.24), (0.6, 0.24), (0.5, 0.35), (-0.18, 0.35)),
        _several(
            "window",
            _polygon((0.38, -0.2), (0.5, -0.16), (0.62, 0.02), (0.62, 0.12), (0.38, 0.12)),
            _box(-0.2, -0.12, 0.02, 0.1),
        ),
        _single("door", _box(0.09, -0.2, 0.31, 0.26), _box(0.13, -0.13, 0.27, 0.02, shade=1.35)),
        _single("tail rotor", _ellipse(-0.9, 0.1, 0.07, 0.3), _ellipse(-0.9, 0.1, 0.07, shade=0.5)),
        _single("searchlight", _ellipse(0.6, 0.4, 0.12), _ellipse(0.63, 0.42, 0.06, shade=1.3)),
        _required("rotor", _bar((0.12, -0.26), (0.12, -0.56), 0.09), _bar((-0.72, -0.58), (0.95, -0.58), 0.1)),
    ),
}

BOATS = {
    "sailboat": (
        _single("rudder", _polygon((-0.94, 0.42), (-0.72, 0.42), (-0.66, 0.9), (-0.9, 0.9))),
        _required("mast", _box(-0.045, -0.94, 0.045, 0.35)),
        _single("flag", _polygon((0.04, -0.95), (0.42, -0.84), (0.04, -0.7))),
        _single("mainsail", _polygon((-0.08, -0.74), (-0.08, 0.13), (-0.74, 0.13))),
        _single("jib", _polygon((0.08, -0.62), (0.08, 0.13), (0.68, 0.13))),
        _required("hull", _polygon((-0.9, 0.3), (0.94, 0.3), (0.68, 0.74), (-0.66, 0.74))),
        _stripe((-0.87, 0.34), (0.91, 0.34), (0.86, 0.44), (-0.82, 0.44)),
        _several("porthole", *[_ellipse(x, 0.58, 0.085) for x in (-0.46, -0.18, 0.1)]),
    ),
    "tugboat": (
        _single("mast", _bar((0.64, -0.8), (0.64, 0.2), 0.07), _bar((0.52, -0.58), (0.76, -0.58), 0.06)),
        _single("funnel", _box(0.04, -0.8, 0.26, -0.34), _box(0.04, -0.72, 0.26, -0.62, shade=0.4)),
        _flag(-0.2, -0.36, -0.92, -0.38),
        _required("cabin", _polygon((-0.36, -0.38), (0.3, -0.38), (0.34, 0.24), (-0.42, 0.24))),
        _several("window", _box(-0.28, -0.28, -0.06, -0.02), _box(0.03, -0.28, 0.24, -0.02)),
        _single("searchlight", _ellipse(0.42, -0.24, 0.12), _ellipse(0.46, -0.24, 0.06, shade=1.3)),
        _required("hull", _polygon((-0.96, 0.18), (0.96, 0.1), (0.78, 0.7), (-0.76, 0.7))),
        _several("tyre", *[_wheel(x, 0.46, 0.14) for x in (-0.52, -0.14, 0.24)]),
    ),
    "submarine": (
        _single("propeller", _ellipse(-0.93, 0.2, 0.07, 0.32), _ellipse(-0.93, 0.2, 0.07, shade=0.5)),
        _flag(-0.42, 0.0, -0.6, -0.36),
        _single("antenna", _bar((-0.08, -0.34), (-0.2, -0.9), 0.07)),
        _single("periscope", _bar((0.14, -0.34), (0.14, -0.84), 0.08), _bar((0.1, -0.84), (0.32, -0.84), 0.1)),
        _required("tower", _polygon((-0.2, -0.4), (0.28, -0.4), (0.36, 0.0), (-0.26, 0.0))),
        _required(
            "hull",
            _polygon(
                (-0.92, 0.18),
                (-0.72, 0.02),
                (-0.3, -0.07),
                (0.6, -0.07),
                (0.85, 0.04),
                (0.98, 0.2),
                (0.85, 0.39),
                (0.6, 0.48),
                (-0.4, 0.48),
                (-0.76, 0.37),
            ),
        ),
        _several("porthole", *[_ellipse(x, 0.2, 0.09) for x in (-0.34, 0.0, 0.34)]),
        _single("searchlight", _ellipse(0.78, 0.2, 0.12), _ellipse(0.82, 0.2, 0.06, shade=1.3)),
    ),
}

ROAD_VEHICLES = {
    "pickup truck": (
        _single("antenna", _bar((-0.06, -0.38), (-0.2, -0.9), 0.065)),
        _single("searchlight", _ellipse(0.16, -0.5, 0.13, 0.12), _ellipse(0.2, -0.5, 0.06, shade=1.3)),
        _single("spare wheel", *_wheel(-0.6, -0.16, 0.22)),
        _required(
            "cab",
            _polygon(
                (-0.2, 0.05), (-0.16, -0.42), (0.3, -0.42), (0.5, -0.05), (0.92, 0.02), (0.94, 0.36), (-0.2, 0.36)
            ),
        ),
        _required("cargo bed", _box(-0.96, -0.06, -0.2, 0.36)),
        _several(
            "window",
            _box(-0.1, -0.33, 0.08, -0.05),
            _polygon((0.15, -0.33), (0.27, -0.33), (0.4, -0.05), (0.15, -0.05)),
        ),
        _single("headlight", _ellipse(0.84, 0.12, 0.1)),
        _several("wheel", _wheel(-0.56, 0.4, 0.21), _wheel(0.5, 0.4, 0.21)),
    ),
    "fire engine": (
        _ladder((-0.9, -0.45), (0.32, -0.62)),
        _single("siren", _box(0.46, -0.54, 0.72, -0.32), _box(0.46, -0.42, 0.72, -0.32, shade=0.5)),
        _required("body", _box(-0.95, -0.34, 0.36, 0.38)),
        _required("cab", _polygon((0.36, -0.36), (0.74, -0.36), (0.95, 0.0), (0.95, 0.38), (0.36, 0.38))),
        _single("window", _polygon((0.44, -0.27), (0.7, -0.27), (0.85, 0.0), (0.44, 0.0))),
        _single(
            "hose", _ellipse(-0.22, -0.04, 0.21), _ellipse(-0.22, -0.04, 0.13, shade=0.7), _ellipse(-0.22, -0.04, 0.06)
        ),
        _single("headlight", _ellipse(0.85, 0.14, 0.1)),
        _several("wheel", _wheel(-0.66, 0.42, 0.19), _wheel(-0.16, 0.42, 0.19), _wheel(0.54, 0.42, 0.19)),
    ),
    "bus": (
        _single("antenna", _bar((0.52, -0.48), (0.64, -0.94), 0.065)),
        _required("body", _polygon((-0.95, -0.52), (0.84, -0.52), (0.95, -0.36), (0.95, 0.4), (-0.95, 0.4))),
        _stripe((-0.94, 0.04), (0.94, 0.04), (0.94, 0.16), (-0.94, 0.16)),
        _several("window", *[_box(x, -0.38, x + 0.24, -0.07) for x in (-0.86, -0.53, -0.2, 0.62)]),
        _single(
            "door",
            _box(0.18, -0.34, 0.5, 0.38),
            _box(0.22, -0.28, 0.32, 0.1, shade=1.35),
            _box(0.36, -0.28, 0.46, 0.1, shade=1.35),
        ),
        _several("wheel", _wheel(-0.55, 0.42, 0.2), _wheel(0.68, 0.42, 0.2)),
        _single("headlight", _ellipse(0.86, 0.16, 0.1)),
    ),
}

FURNITURE = {
    "armchair": (
        _several("leg", _box(-0.6, 0.56, -0.42, 0.94), _box(0.42, 0.56, 0.6, 0.94)),
        _required(
            "backrest", _polygon((-0.6, -0.58), (-0.48, -0.7), (0.48, -0.7), (0.6, -0.58), (0.6, 0.24), (-0.6, 0.24))
        ),
        _single("headrest", _polygon((-0.32, -0.92), (0.32, -0.92), (0.38, -0.62), (-0.38, -0.62))),
        _single("pillow", _polygon((-0.36, -0.44), (0.02, -0.48), (0.06, -0.08), (-0.32, -0.06))),
        _required("seat", _box(-0.62, 0.2, 0.62, 0.62)),
        _single("cushion", _polygon((-0.5, 0.02), (0.5, 0.02), (0.54, 0.22), (-0.54, 0.22))),
        _several("armrest", _box(-0.84, -0.12, -0.56, 0.62), _box(0.56, -0.12, 0.84, 0.62)),
        _single("footrest", _box(-0.32, 0.79, 0.32, 0.95)),
    ),
    "bed": (
        _single(
            "lamp",
            _bar((0.22, -0.96), (0.22, -0.7), 0.05, shade=0.4),
            _polygon((0.0, -0.5), (0.12, -0.74), (0.32, -0.74), (0.44, -0.5)),
        ),
        _several("leg", _box(-0.78, 0.48, -0.6, 0.88), _box(0.6, 0.48, 0.78, 0.88)),
        _several("pillow", _ellipse(-0.62, -0.12, 0.18, 0.15), _ellipse(-0.19, -0.12, 0.18, 0.15)),
        _single(
            "shelf",
            _box(-0.76, -0.74, -0.06, -0.62),
            _box(-0.66, -0.62, -0.59, -0.52),
            _box(-0.22, -0.62, -0.15, -0.52),
        ),
        _required("mattress", _box(-0.84, -0.04, 0.84, 0.24)),
        _required("frame", _box(-0.86, 0.22, 0.86, 0.54)),
        _several("drawer", _drawer(-0.66, 0.28, -0.1, 0.48), _drawer(0.1, 0.28, 0.66, 0.48)),
        _single("headboard", _polygon((-1.0, -0.5), (-0.8, -0.5), (-0.8, 0.56), (-1.0, 0.56))),
    ),
    "desk": (
        _single(
            "shelf", _box(-0.92, -0.86, 0.0, -0.74), _box(-0.8, -0.74, -0.73, -0.64), _box(-0.2, -0.74, -0.13, -0.64)
        ),
        _single("footrest", _bar((-0.84, 0.66), (0.84, 0.66), 0.13)),
        _required("leg", _box(-0.88, 0.1, -0.7, 0.94), _box(0.7, 0.1, 0.88, 0.94)),
        _several("drawer", *[_drawer(0.14, top, 0.62, top + 0.17) for top in (0.16, 0.38)]),
        _single(
            "monitor",
            _box(0.02, -0.14, 0.14, 0.02),
            _box(-0.26, -0.56, 0.42, -0.12),
            _box(-0.2, -0.5, 0.36, -0.18, shade=2.2),
        ),
        _single(
            "lamp",
            _bar((-0.64, 0.0), (-0.74, -0.34), 0.07, shade=0.4),
            _polygon((-0.98, -0.24), (-0.86, -0.5), (-0.64, -0.5), (-0.52, -0.24)),
        ),
        _several("book", _book(0.48, -0.32, 1.0), _book(0.64, -0.26, 0.8)),
        _required("tabletop", _box(-0.96, 0.0, 0.96, 0.14)),
    ),
}

FAMILIES: dict[str, dict[str, tuple[Part, ...]]] = {
    "aircraft": AIRCRAFT,
    "boat": BOATS,
    "road vehicle": ROAD_VEHICLES,
    "furniture": FURNITURE,
}
OBJECTS: dict[str, tuple[Part, ...]] = {
    label: parts for family in FAMILIES.values() for label, parts in family.items()
}

# A part without an entry takes a random colour: the large required ones, whose colour then tells nothing.
COLOURS: dict[str, Colour] = {
    "antenna": (60, 60, 66),
    "armrest": (126, 82, 48),
    "book": (196, 60, 60),
    "cockpit": (120, 190, 222),
    "cushion": (92, 160, 92),
    "door": (134, 92, 60),
    "drawer": (216, 178, 120),
    "flag": (214, 44, 44),
    "footrest": (98, 118, 160),
    "funnel": (204, 84, 50),
    "headboard": (120, 74, 44),
    "headlight": (250, 226, 110),
    "headrest": (232, 224, 206),
    "hose": (200, 76, 52),
    "jib": (240, 150, 66),
    "ladder": (216, 218, 222),
    "lamp": (246, 214, 110),
    "landing gear": (48, 48, 54),
    "leg": (104, 68, 42),
    "mainsail": (246, 242, 230),
    "mast": (140, 98, 62),
    "monitor": (54, 60, 74),
    "periscope": (112, 120, 110),
    "pillow": (246, 244, 240),
    "porthole": (150, 214, 236),
    "propeller": (150, 108, 64),
    "rudder": (64, 92, 150),
    "searchlight": (252, 236, 150),
    "shelf": (170, 120, 76),
    "siren": (52, 96, 216),
    "spare wheel": (44, 44, 48),
    "stripe": (52, 92, 190),
    "tail fin": (226, 120, 52),
    "tail rotor": (66, 66, 72),
    "tyre": (44, 44, 48),
    "wheel": (44, 44, 48),
    "window": (164, 216, 240),
}
