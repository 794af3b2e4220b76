"""The objects of `mini_hard`: those of the miniature and twelve more, each a list of parts from back to front.

Coordinates are as in `plum_partonomy.drawn.objects`. Rare parts are drawn in about one of seven pictures.
"""

from plum_partonomy.drawn.objects import COLOURS as MINI_COLOURS
from plum_partonomy.drawn.objects import (
    FAMILIES,
    Colour,
    Part,
    bar,
    box,
    ellipse,
    polygon,
    rare,
    required,
    several,
    single,
)
from plum_partonomy.drawn.objects import wheel as _wheel

ANIMALS = {
    "bird": (
        single("tail feather", polygon((-0.98, -0.3), (-0.9, 0.02), (-0.5, 0.2), (-0.56, -0.04))),
        several("leg", bar((-0.1, 0.4), (-0.14, 0.92), 0.07), bar((0.14, 0.4), (0.16, 0.92), 0.07)),
        required("torso", ellipse(-0.06, 0.12, 0.58, 0.36)),
        required("head", ellipse(0.5, -0.32, 0.28)),
        single("crest", polygon((0.34, -0.56), (0.26, -0.96), (0.52, -0.78), (0.66, -0.98), (0.68, -0.56))),
        single("beak", polygon((0.72, -0.44), (0.99, -0.28), (0.72, -0.16))),
        single("eye", ellipse(0.56, -0.38, 0.09), ellipse(0.58, -0.38, 0.04, shade=0.2)),
        single("wing", polygon((0.22, -0.08), (-0.3, -0.06), (-0.62, 0.4), (-0.04, 0.28))),
        rare("worm", bar((0.84, -0.2), (0.76, 0.1), 0.07), bar((0.76, 0.1), (0.88, 0.3), 0.07)),
    ),
    "fish": (
        single("caudal fin", polygon((-0.6, 0.0), (-0.98, -0.42), (-0.86, 0.0), (-0.98, 0.42))),
        single("dorsal fin", polygon((-0.3, -0.3), (-0.12, -0.74), (0.36, -0.66), (0.3, -0.28))),
        single("pelvic fin", polygon((-0.1, 0.3), (-0.26, 0.7), (0.1, 0.66), (0.2, 0.32))),
        required("torso", ellipse(0.1, 0.0, 0.74, 0.4)),
        single("gill", polygon((0.36, -0.28), (0.46, -0.28), (0.4, 0.0), (0.46, 0.28), (0.36, 0.28), (0.28, 0.0))),
        single("eye", ellipse(0.6, -0.12, 0.1), ellipse(0.62, -0.12, 0.05, shade=0.2)),
        single("mouth", polygon((0.72, 0.08), (0.96, 0.04), (0.92, 0.18), (0.74, 0.2))),
        rare("barbel", bar((0.76, 0.2), (0.72, 0.56), 0.06), bar((0.84, 0.18), (0.9, 0.52), 0.06)),
    ),
    "snail": (
        rare("leaf", polygon((0.3, 0.66), (0.66, 0.94), (0.98, 0.86), (0.74, 0.6))),
        several("tentacle", bar((0.66, 0.1), (0.56, -0.44), 0.07), bar((0.8, 0.12), (0.94, -0.38), 0.07)),
        several("eye", ellipse(0.55, -0.5, 0.1), ellipse(0.94, -0.44, 0.1)),
        required("foot", polygon((-0.94, 0.62), (-0.6, 0.4), (0.5, 0.36), (0.62, 0.0), (0.92, 0.06), (0.9, 0.62))),
        single("mouth", ellipse(0.84, 0.24, 0.1, 0.07)),
        required("shell", ellipse(-0.14, -0.08, 0.56, 0.52)),
        single("spiral", ellipse(-0.14, -0.08, 0.3, 0.28), ellipse(-0.1, -0.1, 0.15, 0.14, shade=1.5)),
        single("stripe", polygon((-0.62, 0.16), (0.34, 0.16), (0.26, 0.3), (-0.54, 0.3))),
    ),
}

BUILDINGS = {
    "house": (
        single("chimney", box(0.36, -0.92, 0.6, -0.36)),
        rare("weather vane", bar((-0.3, -0.62), (-0.3, -0.96), 0.06), bar((-0.46, -0.9), (-0.12, -0.9), 0.08)),
        required("roof", polygon((-0.92, -0.14), (-0.5, -0.66), (0.5, -0.66), (0.92, -0.14))),
        single("skylight", polygon((-0.22, -0.52), (0.08, -0.52), (0.12, -0.28), (-0.24, -0.28))),
        required("wall", box(-0.8, -0.14, 0.8, 0.8)),
        several("window", box(-0.68, 0.0, -0.36, 0.3), box(0.36, 0.0, 0.68, 0.3)),
        single("balcony", box(0.28, 0.34, 0.76, 0.5), box(0.28, 0.3, 0.76, 0.35, shade=0.6)),
        single("door", box(-0.18, 0.26, 0.16, 0.8), ellipse(0.1, 0.54, 0.035, shade=0.4)),
        single("step", box(-0.34, 0.8, 0.32, 0.93)),
    ),
    "windmill": (
        single("fence", *[box(x, 0.66, x + 0.1, 0.96) for x in (-0.94, -0.74, -0.54)], box(-0.94, 0.74, -0.44, 0.82)),
        required("tower", polygon((-0.26, -0.3), (0.26, -0.3), (0.42, 0.9), (-0.42, 0.9))),
        required("cap", polygon((-0.32, -0.28), (-0.16, -0.6), (0.16, -0.6), (0.32, -0.28))),
        single("gallery", box(-0.54, 0.22, 0.54, 0.34), box(-0.54, 0.14, 0.54, 0.2, shade=0.6)),
        several("window", box(-0.1, -0.14, 0.1, 0.08)),
        single("door", box(-0.14, 0.5, 0.14, 0.9), ellipse(0.08, 0.72, 0.035, shade=0.4)),
        several(
            "sail",
            *[
                (bar((0.0, -0.42), (x, y), 0.05, shade=0.5), bar((x * 0.5, y * 0.5 - 0.21), (x, y), 0.22))
                for x, y in ((-0.66, -0.94), (0.66, -0.94), (-0.78, 0.02), (0.78, 0.02))
            ],
        ),
        rare("sack", ellipse(0.66, 0.8, 0.17, 0.16), box(0.6, 0.58, 0.72, 0.68)),
    ),
    "castle": (
        single(
            "banner",
            bar((0.0, -0.3), (0.0, -0.96), 0.05, shade=0.5),
            polygon((0.03, -0.94), (0.4, -0.8), (0.03, -0.66)),
        ),
        several(
            "turret",
            (box(-0.94, -0.5, -0.6, 0.6), polygon((-0.98, -0.5), (-0.77, -0.9), (-0.56, -0.5), shade=0.6)),
            (box(0.6, -0.5, 0.94, 0.6), polygon((0.56, -0.5), (0.77, -0.9), (0.98, -0.5), shade=0.6)),
        ),
        required("wall", box(-0.6, -0.1, 0.6, 0.66)),
        required("battlement", *[box(x, -0.34, x + 0.2, -0.1) for x in (-0.6, -0.24, 0.1, 0.42)]),
        several("arrow slit", *[box(x, 0.0, x + 0.09, 0.26) for x in (-0.5, -0.3, 0.24, 0.44)]),
        single("gate", polygon((-0.2, 0.66), (-0.2, 0.2), (0.0, 0.04), (0.2, 0.2), (0.2, 0.66))),
        single("moat", polygon((-0.98, 0.68), (0.98, 0.68), (0.92, 0.94), (-0.92, 0.94))),
        rare("drawbridge", polygon((-0.2, 0.64), (0.2, 0.64), (0.3, 0.98), (-0.3, 0.98))),
    ),
}

MACHINES = {
    "locomotive": (
        single("funnel", box(0.42, -0.72, 0.62, -0.24), box(0.36, -0.8, 0.68, -0.68, shade=0.6)),
        rare("bell", polygon((0.04, -0.3), (0.1, -0.54), (0.2, -0.54), (0.26, -0.3))),
        required("boiler", box(-0.4, -0.28, 0.84, 0.22)),
        required("cab", box(-0.94, -0.62, -0.36, 0.26)),
        several("window", box(-0.8, -0.5, -0.5, -0.2)),
        single("headlight", ellipse(0.84, -0.36, 0.1)),
        single("stripe", polygon((-0.36, -0.08), (0.84, -0.08), (0.84, 0.04), (-0.36, 0.04))),
        single("cowcatcher", polygon((0.8, 0.22), (0.99, 0.62), (0.64, 0.62))),
        several("wheel", *[_wheel(x, 0.42, 0.2) for x in (-0.66, -0.14, 0.36)]),
        single("coupling rod", bar((-0.66, 0.44), (0.36, 0.44), 0.09)),
    ),
    "bicycle": (
        single("mudguard", bar((-0.86, 0.06), (-0.5, -0.06), 0.09), bar((-0.5, -0.06), (-0.2, 0.1), 0.09)),
        required("wheel", *_wheel(-0.54, 0.42, 0.38), *_wheel(0.56, 0.42, 0.38)),
        required(
            "frame",
            bar((-0.54, 0.42), (-0.16, -0.2), 0.08),
            bar((-0.16, -0.2), (0.42, -0.22), 0.08),
            bar((0.42, -0.22), (0.0, 0.42), 0.08),
            bar((0.0, 0.42), (-0.2, -0.3), 0.08),
            bar((0.56, 0.42), (0.38, -0.36), 0.08),
        ),
        rare("pump", bar((0.1, -0.12), (-0.1, 0.22), 0.09)),
        single("saddle", polygon((-0.44, -0.46), (-0.02, -0.46), (-0.04, -0.34), (-0.36, -0.3))),
        single("handlebar", bar((0.2, -0.6), (0.56, -0.5), 0.09), bar((0.38, -0.54), (0.38, -0.36), 0.08)),
        single("basket", polygon((0.56, -0.46), (0.98, -0.46), (0.9, -0.12), (0.62, -0.12))),
        single("lamp", ellipse(0.52, 0.0, 0.11)),
        single("pedal", bar((0.0, 0.42), (0.14, 0.62), 0.06, shade=0.6), box(0.06, 0.6, 0.3, 0.7)),
    ),
    "tractor": (
        single("exhaust pipe", box(0.5, -0.76, 0.6, -0.18)),
        single(
            "plough",
            bar((-0.7, 0.3), (-0.94, 0.5), 0.08, shade=0.6),
            polygon((-0.98, 0.44), (-0.76, 0.5), (-0.86, 0.84)),
        ),
        required("hood", box(0.06, -0.18, 0.92, 0.3)),
        single(
            "cab",
            polygon((-0.5, 0.1), (-0.42, -0.76), (0.02, -0.76), (0.12, 0.1)),
            box(-0.36, -0.64, -0.02, -0.24, shade=1.5),
        ),
        single("headlight", ellipse(0.84, -0.06, 0.1)),
        single("stripe", polygon((0.1, 0.06), (0.92, 0.06), (0.92, 0.16), (0.1, 0.16))),
        rare("hitch", box(0.9, 0.14, 0.99, 0.4), box(0.84, 0.34, 0.99, 0.42)),
        required("wheel", *_wheel(-0.36, 0.42, 0.42), *_wheel(0.66, 0.58, 0.25)),
        single(
            "fender",
            polygon(
                (-0.84, 0.14), (-0.6, -0.16), (-0.1, -0.16), (0.1, 0.14), (-0.06, 0.14), (-0.36, -0.04), (-0.7, 0.14)
            ),
        ),
    ),
}

TOYS = {
    "robot": (
        single("antenna", bar((0.0, -0.7), (0.1, -0.92), 0.06), ellipse(0.1, -0.92, 0.08)),
        several("arm", bar((-0.46, -0.1), (-0.84, 0.36), 0.14), bar((0.46, -0.1), (0.84, 0.36), 0.14)),
        rare("claw", polygon((0.74, 0.4), (0.98, 0.36), (0.96, 0.62), (0.86, 0.5), (0.78, 0.64))),
        several("leg", box(-0.34, 0.5, -0.12, 0.94), box(0.12, 0.5, 0.34, 0.94)),
        required("torso", box(-0.46, -0.22, 0.46, 0.54)),
        required("head", box(-0.34, -0.72, 0.34, -0.24)),
        several("eye", ellipse(-0.16, -0.52, 0.1), ellipse(0.16, -0.52, 0.1)),
        single("mouth", box(-0.2, -0.38, 0.2, -0.28)),
        single("screen", box(-0.34, -0.12, 0.12, 0.18), box(-0.28, -0.06, 0.06, 0.12, shade=1.9)),
        several("button", *[ellipse(0.3, y, 0.075) for y in (-0.06, 0.14, 0.34)]),
    ),
    "snowman": (
        single(
            "broom",
            bar((-0.72, -0.5), (-0.72, 0.9), 0.07),
            polygon((-0.9, -0.46), (-0.54, -0.46), (-0.5, -0.9), (-0.94, -0.9)),
        ),
        required("base", ellipse(0.0, 0.58, 0.48, 0.38)),
        required("chest", ellipse(0.0, 0.02, 0.36, 0.3)),
        required("head", ellipse(0.0, -0.44, 0.27)),
        several("arm", bar((-0.3, 0.0), (-0.66, -0.2), 0.07), bar((0.3, 0.0), (0.84, -0.24), 0.07)),
        single("hat", box(-0.36, -0.68, 0.36, -0.58), box(-0.22, -0.96, 0.22, -0.66)),
        single(
            "scarf", polygon((-0.3, -0.26), (0.3, -0.26), (0.3, -0.14), (-0.3, -0.14)), box(0.14, -0.16, 0.28, 0.14)
        ),
        single("nose", polygon((0.02, -0.5), (0.42, -0.4), (0.02, -0.36))),
        several("button", *[ellipse(-0.06, y, 0.07) for y in (-0.02, 0.16, 0.46)]),
        rare("pipe", bar((0.14, -0.26), (0.5, -0.2), 0.06), box(0.44, -0.36, 0.58, -0.18)),
    ),
    "teapot": (
        single("stand", polygon((-0.5, 0.68), (0.5, 0.68), (0.62, 0.86), (-0.62, 0.86))),
        single(
            "handle",
            polygon(
                (-0.5, -0.2),
                (-0.94, -0.3),
                (-0.96, 0.4),
                (-0.44, 0.46),
                (-0.5, 0.3),
                (-0.76, 0.28),
                (-0.76, -0.14),
                (-0.5, -0.04),
            ),
        ),
        single("spout", polygon((0.44, 0.36), (0.5, 0.02), (0.8, -0.46), (0.98, -0.4), (0.72, 0.3))),
        required("pot", ellipse(0.0, 0.16, 0.6, 0.54)),
        single("lid", polygon((-0.36, -0.26), (-0.26, -0.46), (0.26, -0.46), (0.36, -0.26))),
        single("knob", ellipse(0.0, -0.56, 0.12)),
        single("stripe", polygon((-0.56, 0.36), (0.56, 0.36), (0.46, 0.5), (-0.46, 0.5))),
        single(
            "flower",
            *[ellipse(0.0 + x, 0.04 + y, 0.1) for x, y in ((-0.12, 0), (0.12, 0), (0, -0.12), (0, 0.12))],
            ellipse(0.0, 0.04, 0.07, shade=1.6),
        ),
        rare("tag", bar((0.3, -0.3), (0.38, 0.1), 0.05, shade=0.5), box(0.3, 0.1, 0.5, 0.32)),
    ),
}

HARD_FAMILIES: dict[str, dict[str, tuple[Part, ...]]] = {
    **FAMILIES,
    "animal": ANIMALS,
    "building": BUILDINGS,
    "wheeled machine": MACHINES,
    "toy": TOYS,
}

HARD_COLOURS: dict[str, Colour] = {
    **MINI_COLOURS,
    "arm": (120, 96, 80),
    "arrow slit": (40, 40, 46),
    "balcony": (190, 150, 110),
    "banner": (190, 40, 90),
    "barbel": (220, 150, 140),
    "basket": (190, 140, 80),
    "beak": (240, 170, 40),
    "bell": (236, 196, 70),
    "broom": (200, 160, 90),
    "button": (200, 60, 60),
    "caudal fin": (230, 120, 70),
    "chimney": (160, 80, 60),
    "claw": (90, 90, 100),
    "coupling rod": (180, 60, 50),
    "cowcatcher": (70, 76, 88),
    "crest": (220, 70, 60),
    "dorsal fin": (240, 160, 60),
    "drawbridge": (120, 84, 52),
    "exhaust pipe": (60, 60, 66),
    "eye": (246, 246, 240),
    "fence": (226, 222, 210),
    "fender": (70, 110, 180),
    "flower": (230, 100, 140),
    "gallery": (150, 110, 70),
    "gate": (96, 66, 44),
    "gill": (190, 90, 80),
    "handle": (120, 84, 60),
    "handlebar": (60, 60, 70),
    "hat": (44, 44, 52),
    "hitch": (80, 80, 90),
    "knob": (220, 190, 90),
    "leaf": (90, 170, 80),
    "lid": (170, 120, 160),
    "moat": (90, 150, 200),
    "mouth": (180, 60, 60),
    "mudguard": (70, 130, 110),
    "nose": (240, 130, 40),
    "pedal": (50, 50, 56),
    "pelvic fin": (236, 190, 90),
    "pipe": (110, 70, 44),
    "plough": (120, 124, 134),
    "pump": (210, 210, 214),
    "sack": (200, 180, 140),
    "saddle": (90, 60, 44),
    "sail": (238, 234, 222),
    "scarf": (210, 50, 70),
    "screen": (50, 70, 90),
    "skylight": (170, 216, 240),
    "spiral": (150, 100, 70),
    "spout": (150, 170, 120),
    "stand": (120, 90, 64),
    "step": (170, 170, 172),
    "tag": (244, 236, 200),
    "tail feather": (90, 140, 190),
    "tentacle": (180, 160, 120),
    "turret": (150, 146, 150),
    "weather vane": (70, 70, 76),
    "worm": (230, 140, 150),
}
