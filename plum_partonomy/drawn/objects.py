"""The objects of the miniature: twelve kinds, each a list of parts from back to front.

Coordinates are in the frame of the object: x to the right and y down, both in [-1, 1], with the object facing right. A
part has one or more instances (four windows, two wheels), and an instance has one or more shapes (a tyre and its hub).
Required parts are always drawn, optional ones in about half of the pictures, so the answer depends on the image.
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
    presence: float = 0.5
    """Share of the drawings of the object with this part."""

    @property
    def required(self) -> bool:
        return self.presence == 1


def polygon(*points: Point, shade: float = 1.0) -> Shape:
    return Shape(points, shade)


def box(left: float, top: float, right: float, bottom: float, *, shade: float = 1.0) -> Shape:
    return Shape(((left, top), (right, top), (right, bottom), (left, bottom)), shade)


def ellipse(x: float, y: float, radius_x: float, radius_y: float | None = None, *, shade: float = 1.0) -> Shape:
    radius_y = radius_x if radius_y is None else radius_y
    angles = [2 * math.pi * step / 20 for step in range(20)]
    return Shape(tuple((x + radius_x * math.cos(a), y + radius_y * math.sin(a)) for a in angles), shade)


def bar(start: Point, end: Point, width: float, *, shade: float = 1.0) -> Shape:
    (x0, y0), (x1, y1) = start, end
    scale = width / 2 / math.hypot(x1 - x0, y1 - y0)
    dx, dy = -(y1 - y0) * scale, (x1 - x0) * scale
    return Shape(((x0 + dx, y0 + dy), (x1 + dx, y1 + dy), (x1 - dx, y1 - dy), (x0 - dx, y0 - dy)), shade)


def required(name: str, *shapes: Shape) -> Part:
    return Part(name, (shapes,), presence=1)


def rare(name: str, *shapes: Shape) -> Part:
    return Part(name, (shapes,), presence=0.15)


def single(name: str, *shapes: Shape) -> Part:
    return Part(name, (shapes,))


def several(name: str, *instances: Shape | Instance) -> Part:
    return Part(name, tuple((item,) if isinstance(item, Shape) else item for item in instances))


def wheel(x: float, y: float, radius: float) -> Instance:
    return ellipse(x, y, radius), ellipse(x, y, radius * 0.45, shade=2.6)


def _gear(x: float, top: float, bottom: float, radius: float) -> Instance:
    return (bar((x, top), (x, bottom), 0.06, shade=1.8), *wheel(x, bottom, radius))


def flag(x: float, foot: float, top: float, length: float) -> Part:
    cloth = polygon((x, top), (x + length, top + 0.13), (x, top + 0.27))
    return single("flag", bar((x, foot), (x, top - 0.02), 0.045, shade=0.55), cloth)


def _ladder(start: Point, end: Point) -> Part:
    (x0, y0), (x1, y1) = start, end
    rungs = [(x0 + (x1 - x0) * step, y0 + (y1 - y0) * step) for step in (0.08, 0.29, 0.5, 0.71, 0.92)]
    rails = [bar((x0, y0 + offset), (x1, y1 + offset), 0.05) for offset in (-0.07, 0.07)]
    return single("ladder", *[bar((x, y - 0.07), (x, y + 0.07), 0.05, shade=0.8) for x, y in rungs], *rails)


def stripe(*points: Point) -> Part:
    return single("stripe", polygon(*points))


def _drawer(left: float, top: float, right: float, bottom: float) -> Instance:
    knob = ellipse((left + right) / 2, (top + bottom) / 2, 0.045, shade=0.45)
    return box(left, top, right, bottom), knob


def _book(left: float, top: float, shade: float) -> Instance:
    return (box(left, top, left + 0.11, 0.0, shade=shade),)


AIRCRAFT = {
    "passenger jet": (
        single("tail fin", polygon((-0.94, -0.64), (-0.7, -0.64), (-0.42, -0.14), (-0.84, -0.1))),
        several("landing gear", _gear(-0.66, 0.1, 0.36, 0.11), _gear(0.56, 0.1, 0.36, 0.11)),
        single("antenna", polygon((0.2, -0.18), (0.27, -0.5), (0.36, -0.5), (0.38, -0.18))),
        required(
            "fuselage",
            polygon(
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
        stripe((-0.78, 0.06), (0.9, 0.06), (0.84, 0.15), (-0.66, 0.15)),
        several("window", *[ellipse(x, -0.08, 0.075) for x in (-0.6, -0.36, -0.12, 0.12)]),
        single("door", box(0.3, -0.17, 0.46, 0.15), box(0.33, -0.12, 0.43, -0.01, shade=1.35)),
        required("wing", polygon((0.2, 0.06), (-0.16, 0.06), (-0.56, 0.64), (-0.32, 0.64))),
    ),
    "biplane": (
        single("tail fin", polygon((-0.97, -0.52), (-0.75, -0.56), (-0.55, -0.1), (-0.94, -0.04))),
        several("landing gear", _gear(0.18, 0.1, 0.55, 0.13), _gear(0.54, 0.1, 0.55, 0.13)),
        flag(-0.24, -0.1, -0.78, -0.36),
        required(
            "fuselage",
            polygon(
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
        stripe((-0.86, -0.05), (-0.1, -0.09), (-0.1, 0.04), (-0.86, 0.02)),
        single("cockpit", polygon((-0.16, -0.16), (-0.08, -0.37), (0.1, -0.37), (0.06, -0.18))),
        required(
            "wing",
            bar((0.36, -0.56), (0.36, -0.16), 0.06, shade=0.6),
            box(0.0, -0.68, 0.74, -0.54),
            box(-0.04, 0.2, 0.7, 0.33),
        ),
        single("propeller", ellipse(0.88, -0.04, 0.06, 0.46), ellipse(0.87, -0.04, 0.09, shade=0.5)),
    ),
    "helicopter": (
        single("tail fin", polygon((-0.99, -0.5), (-0.8, -0.5), (-0.62, -0.08), (-0.9, -0.05))),
        required(
            "fuselage",
            polygon((-0.2, -0.12), (-0.96, -0.13), (-0.96, -0.02), (-0.2, 0.2)),
            ellipse(0.16, 0.08, 0.5, 0.37),
        ),
        stripe((-0.28, 0.24), (0.6, 0.24), (0.5, 0.35), (-0.18, 0.35)),
        several(
            "window",
            polygon((0.38, -0.2), (0.5, -0.16), (0.62, 0.02), (0.62, 0.12), (0.38, 0.12)),
            box(-0.2, -0.12, 0.02, 0.1),
        ),
        single("door", box(0.09, -0.2, 0.31, 0.26), box(0.13, -0.13, 0.27, 0.02, shade=1.35)),
        single("tail rotor", ellipse(-0.9, 0.1, 0.07, 0.3), ellipse(-0.9, 0.1, 0.07, shade=0.5)),
        single("searchlight", ellipse(0.6, 0.4, 0.12), ellipse(0.63, 0.42, 0.06, shade=1.3)),
        required("rotor", bar((0.12, -0.26), (0.12, -0.56), 0.09), bar((-0.72, -0.58), (0.95, -0.58), 0.1)),
    ),
}

BOATS = {
    "sailboat": (
        single("rudder", polygon((-0.94, 0.42), (-0.72, 0.42), (-0.66, 0.9), (-0.9, 0.9))),
        required("mast", box(-0.045, -0.94, 0.045, 0.35)),
        single("flag", polygon((0.04, -0.95), (0.42, -0.84), (0.04, -0.7))),
        single("mainsail", polygon((-0.08, -0.74), (-0.08, 0.13), (-0.74, 0.13))),
        single("jib", polygon((0.08, -0.62), (0.08, 0.13), (0.68, 0.13))),
        required("hull", polygon((-0.9, 0.3), (0.94, 0.3), (0.68, 0.74), (-0.66, 0.74))),
        stripe((-0.87, 0.34), (0.91, 0.34), (0.86, 0.44), (-0.82, 0.44)),
        several("porthole", *[ellipse(x, 0.58, 0.085) for x in (-0.46, -0.18, 0.1)]),
    ),
    "tugboat": (
        single("mast", bar((0.64, -0.8), (0.64, 0.2), 0.07), bar((0.52, -0.58), (0.76, -0.58), 0.06)),
        single("funnel", box(0.04, -0.8, 0.26, -0.34), box(0.04, -0.72, 0.26, -0.62, shade=0.4)),
        flag(-0.2, -0.36, -0.92, -0.38),
        required("cabin", polygon((-0.36, -0.38), (0.3, -0.38), (0.34, 0.24), (-0.42, 0.24))),
        several("window", box(-0.28, -0.28, -0.06, -0.02), box(0.03, -0.28, 0.24, -0.02)),
        single("searchlight", ellipse(0.42, -0.24, 0.12), ellipse(0.46, -0.24, 0.06, shade=1.3)),
        required("hull", polygon((-0.96, 0.18), (0.96, 0.1), (0.78, 0.7), (-0.76, 0.7))),
        several("tyre", *[wheel(x, 0.46, 0.14) for x in (-0.52, -0.14, 0.24)]),
    ),
    "submarine": (
        single("propeller", ellipse(-0.93, 0.2, 0.07, 0.32), ellipse(-0.93, 0.2, 0.07, shade=0.5)),
        flag(-0.42, 0.0, -0.6, -0.36),
        single("antenna", bar((-0.08, -0.34), (-0.2, -0.9), 0.07)),
        single("periscope", bar((0.14, -0.34), (0.14, -0.84), 0.08), bar((0.1, -0.84), (0.32, -0.84), 0.1)),
        required("tower", polygon((-0.2, -0.4), (0.28, -0.4), (0.36, 0.0), (-0.26, 0.0))),
        required(
            "hull",
            polygon(
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
        several("porthole", *[ellipse(x, 0.2, 0.09) for x in (-0.34, 0.0, 0.34)]),
        single("searchlight", ellipse(0.78, 0.2, 0.12), ellipse(0.82, 0.2, 0.06, shade=1.3)),
    ),
}

ROAD_VEHICLES = {
    "pickup truck": (
        single("antenna", bar((-0.06, -0.38), (-0.2, -0.9), 0.065)),
        single("searchlight", ellipse(0.16, -0.5, 0.13, 0.12), ellipse(0.2, -0.5, 0.06, shade=1.3)),
        single("spare wheel", *wheel(-0.6, -0.16, 0.22)),
        required(
            "cab",
            polygon(
                (-0.2, 0.05), (-0.16, -0.42), (0.3, -0.42), (0.5, -0.05), (0.92, 0.02), (0.94, 0.36), (-0.2, 0.36)
            ),
        ),
        required("cargo bed", box(-0.96, -0.06, -0.2, 0.36)),
        several(
            "window",
            box(-0.1, -0.33, 0.08, -0.05),
            polygon((0.15, -0.33), (0.27, -0.33), (0.4, -0.05), (0.15, -0.05)),
        ),
        single("headlight", ellipse(0.84, 0.12, 0.1)),
        several("wheel", wheel(-0.56, 0.4, 0.21), wheel(0.5, 0.4, 0.21)),
    ),
    "fire engine": (
        _ladder((-0.9, -0.45), (0.32, -0.62)),
        single("siren", box(0.46, -0.54, 0.72, -0.32), box(0.46, -0.42, 0.72, -0.32, shade=0.5)),
        required("body", box(-0.95, -0.34, 0.36, 0.38)),
        required("cab", polygon((0.36, -0.36), (0.74, -0.36), (0.95, 0.0), (0.95, 0.38), (0.36, 0.38))),
        single("window", polygon((0.44, -0.27), (0.7, -0.27), (0.85, 0.0), (0.44, 0.0))),
        single(
            "hose", ellipse(-0.22, -0.04, 0.21), ellipse(-0.22, -0.04, 0.13, shade=0.7), ellipse(-0.22, -0.04, 0.06)
        ),
        single("headlight", ellipse(0.85, 0.14, 0.1)),
        several("wheel", wheel(-0.66, 0.42, 0.19), wheel(-0.16, 0.42, 0.19), wheel(0.54, 0.42, 0.19)),
    ),
    "bus": (
        single("antenna", bar((0.52, -0.48), (0.64, -0.94), 0.065)),
        required("body", polygon((-0.95, -0.52), (0.84, -0.52), (0.95, -0.36), (0.95, 0.4), (-0.95, 0.4))),
        stripe((-0.94, 0.04), (0.94, 0.04), (0.94, 0.16), (-0.94, 0.16)),
        several("window", *[box(x, -0.38, x + 0.24, -0.07) for x in (-0.86, -0.53, -0.2, 0.62)]),
        single(
            "door",
            box(0.18, -0.34, 0.5, 0.38),
            box(0.22, -0.28, 0.32, 0.1, shade=1.35),
            box(0.36, -0.28, 0.46, 0.1, shade=1.35),
        ),
        several("wheel", wheel(-0.55, 0.42, 0.2), wheel(0.68, 0.42, 0.2)),
        single("headlight", ellipse(0.86, 0.16, 0.1)),
    ),
}

FURNITURE = {
    "armchair": (
        several("leg", box(-0.6, 0.56, -0.42, 0.94), box(0.42, 0.56, 0.6, 0.94)),
        required(
            "backrest", polygon((-0.6, -0.58), (-0.48, -0.7), (0.48, -0.7), (0.6, -0.58), (0.6, 0.24), (-0.6, 0.24))
        ),
        single("headrest", polygon((-0.32, -0.92), (0.32, -0.92), (0.38, -0.62), (-0.38, -0.62))),
        single("pillow", polygon((-0.36, -0.44), (0.02, -0.48), (0.06, -0.08), (-0.32, -0.06))),
        required("seat", box(-0.62, 0.2, 0.62, 0.62)),
        single("cushion", polygon((-0.5, 0.02), (0.5, 0.02), (0.54, 0.22), (-0.54, 0.22))),
        several("armrest", box(-0.84, -0.12, -0.56, 0.62), box(0.56, -0.12, 0.84, 0.62)),
        single("footrest", box(-0.32, 0.79, 0.32, 0.95)),
    ),
    "bed": (
        single(
            "lamp",
            bar((0.22, -0.96), (0.22, -0.7), 0.05, shade=0.4),
            polygon((0.0, -0.5), (0.12, -0.74), (0.32, -0.74), (0.44, -0.5)),
        ),
        several("leg", box(-0.78, 0.48, -0.6, 0.88), box(0.6, 0.48, 0.78, 0.88)),
        several("pillow", ellipse(-0.62, -0.12, 0.18, 0.15), ellipse(-0.19, -0.12, 0.18, 0.15)),
        single(
            "shelf",
            box(-0.76, -0.74, -0.06, -0.62),
            box(-0.66, -0.62, -0.59, -0.52),
            box(-0.22, -0.62, -0.15, -0.52),
        ),
        required("mattress", box(-0.84, -0.04, 0.84, 0.24)),
        required("frame", box(-0.86, 0.22, 0.86, 0.54)),
        several("drawer", _drawer(-0.66, 0.28, -0.1, 0.48), _drawer(0.1, 0.28, 0.66, 0.48)),
        single("headboard", polygon((-1.0, -0.5), (-0.8, -0.5), (-0.8, 0.56), (-1.0, 0.56))),
    ),
    "desk": (
        single("shelf", box(-0.92, -0.86, 0.0, -0.74), box(-0.8, -0.74, -0.73, -0.64), box(-0.2, -0.74, -0.13, -0.64)),
        single("footrest", bar((-0.84, 0.66), (0.84, 0.66), 0.13)),
        required("leg", box(-0.88, 0.1, -0.7, 0.94), box(0.7, 0.1, 0.88, 0.94)),
        several("drawer", *[_drawer(0.14, top, 0.62, top + 0.17) for top in (0.16, 0.38)]),
        single(
            "monitor",
            box(0.02, -0.14, 0.14, 0.02),
            box(-0.26, -0.56, 0.42, -0.12),
            box(-0.2, -0.5, 0.36, -0.18, shade=2.2),
        ),
        single(
            "lamp",
            bar((-0.64, 0.0), (-0.74, -0.34), 0.07, shade=0.4),
            polygon((-0.98, -0.24), (-0.86, -0.5), (-0.64, -0.5), (-0.52, -0.24)),
        ),
        several("book", _book(0.48, -0.32, 1.0), _book(0.64, -0.26, 0.8)),
        required("tabletop", box(-0.96, 0.0, 0.96, 0.14)),
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

# Parts without an entry get a random colour: the large required ones, whose colour then reveals nothing.
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
