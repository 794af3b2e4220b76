"""Count objects, parts, object-part pairs, images, masks and questions of a data set as the paper does.

Add the rows one by one:

    statistics = Statistics()
    for row in rows:
        statistics.add(row)
    statistics.as_row()
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Statistics:
    """Counts of distinct items over rows of any config. A row that repeats an image adds only its question.

    - Images are distinguished by `image_id`. An image with two objects that a source splits into two examples counts
      twice.
    - A mask is one part of one object in one image; separate instances are separate masks.
    - An object-part pair is a label and a part with a mask.
    """

    rows: int = 0
    images: set[str] = field(default_factory=set)
    pairs: set[tuple[str, str]] = field(default_factory=set)
    masks: set[tuple[str, str, str]] = field(default_factory=set)
    questions: Counter[str] = field(default_factory=Counter)
    licences: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(source, licence) -> rows."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row as returned by `plum_partonomy.records.as_row`, with or without its image."""
        self.rows += 1
        self.images.add(row["image_id"])
        self.licences[row["source"], row["licence"]] += 1
        if "question_type" in row:
            self.questions[row["question_type"]] += 1
        for mask in row["masks"] or ():  # a chat without tags has None
            self.pairs.add((row["image_label"], mask["label"]))
            self.masks.add((row["image_id"], mask["label"], mask["rle"]["counts"]))

    def as_row(self) -> dict[str, int]:
        """Return column -> count."""
        return {
            "objects": len({label for label, _ in self.pairs}),
            "parts": len({part for _, part in self.pairs}),
            "object-part pairs": len(self.pairs),
            "images": len(self.images),
            "masks": len(self.masks),
            "questions": self.questions.total(),
        }

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            self.rows + other.rows,
            self.images | other.images,
            self.pairs | other.pairs,
            self.masks | other.masks,
            self.questions + other.questions,
            self.licences + other.licences,
        )
