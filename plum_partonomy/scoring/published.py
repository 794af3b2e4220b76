"""The published grounded mean IoU on PARTONOMY-Core.

Source: the authors' project page (https://wjdghks950.github.io/partonomy.github.io, commit 5f8cb9c of its repository),
from Table 2 of the paper (arXiv 2505.20759): micro / macro, in percent. The corresponding metrics here are
`reference_micro_giou` and `reference_macro_giou`.
"""

__all__ = ["METHODS", "PUBLISHED", "SOURCE"]

SOURCE = "https://wjdghks950.github.io/partonomy.github.io"
METHODS = ("LISA-13B", "GLaMM", "PLUM", "LISA-13B, fine-tuned", "GLaMM, fine-tuned", "PLUM, fine-tuned")
PUBLISHED = {  # question type here: (name in the paper, figures of METHODS; None where the page has none)
    "identification_with_label": (
        "Identification",
        ((5.9, 7.0), (5.3, 5.9), (14.5, 27.4), (33.6, 35.4), (36.6, 38.8), (36.2, 41.6)),
    ),
    "positive_with_label": (
        "Intersection",
        ((7.1, 7.5), (5.9, 6.2), (23.7, 29.9), (37.0, 38.4), (40.3, 42.1), (42.1, 45.9)),
    ),
    "negative_with_label": (
        "Difference",
        ((6.1, 7.1), (5.2, 6.0), (14.9, 24.8), (30.4, 31.6), (33.6, 34.8), (33.0, 39.4)),
    ),
    "part_to_whole": ("Part-to-Whole", ((5.7, 6.6), (4.8, 5.6), (14.3, 26.8), None, (36.1, 38.5), (36.7, 40.8))),
    "whole_to_part": ("Whole-to-Part", ((6.0, 6.8), (4.9, 5.8), (15.4, 27.5), None, (35.7, 38.0), (36.2, 39.8))),
}
