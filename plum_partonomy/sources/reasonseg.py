"""Read ReasonSeg: images, questions that require reasoning, and the region that answers them, one JSON file each.

The file, shortened (licence: not stated):

    {"text": ["Where can the driver see the speed of the car?", ...], "is_sentence": true,
     "shapes": [{"label": "target", "labels": ["target"], "shape_type": "polygon", "image_name": "1.jpg",
                 "points": [[512.0, 410.5], [600.1, 409.9], [590.0, 480.2]], "group_id": null, "flags": {}},
                {"label": "ignore", ...}]}

    FOLDER/train/1.jpg  FOLDER/train/1.json  FOLDER/val/2.jpg  FOLDER/val/2.json
    FOLDER/explanatory/train.json: [{"image": "1.jpg", "query": "...", "outputs": "The speed is shown ..."}, ...]

If `is_sentence` is false, the texts are phrases, "the camera lens that suits close objects", and the answer tags the
phrase. Sentences are asked unchanged. The files name no answer, so the tag encloses a general phrase such as "this
region". Half of the questions about an image with an explanation ask for it as well. All texts of an image rephrase
each other, so each is a separate conversation.

Smaller shapes are drawn over larger ones. `ignore` regions are ambiguous and do not belong to the training target.
"flag" shapes and shapes of fewer than three points are skipped. Files are UTF-8 or Windows-1252.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from plum_partonomy.masks import RLE, DataError, Size, area, decode, encode
from plum_partonomy.questions.conversations import conversation, turn
from plum_partonomy.questions.grounding import ask_for_each
from plum_partonomy.records import GroundedConversation, PartExample, PartMask, escape_tags
from plum_partonomy.seeding import seeded_generator
from plum_partonomy.sources.json_files import parse_json, read_json
from plum_partonomy.sources.untrusted import ImageFiles, read_polygons, read_text, typed, typed_list

EXPLANATIONS_FILE = "explanatory/train.json"
WORDS_FOR_THE_ANSWER = ("this region", "this area", "this part of the picture", "what is marked")
ANSWERS = (
    "It is {tagged}.",
    "The answer is {tagged}.",
    "That would be {tagged}.",
    "I would say {tagged}.",
    "Look at {tagged}.",
    "{tagged}.",
    "To my mind it is {tagged}.",
    "You are asking about {tagged}.",
)
ASKING_WHY = (
    "Explain your answer.",
    "Please say why.",
    "How can you tell?",
    "Give your reasons as well.",
    "Tell me what speaks for it.",
    "What makes you think so?",
)


class ReasonSeg:
    """One open split. Files are listed on opening and read on access."""

    name: ClassVar[str] = "reasonseg"
    licence: ClassVar[str] = "not stated"
    folders: ClassVar[dict[str, str]] = {"train": "train", "validation": "val", "test": "test"}
    published_counts: ClassVar[dict[str, dict[str, int]]] = {
        "train": {"images": 239},
        "validation": {"images": 200},
        "test": {"images": 779},
    }

    def __init__(self, folder: str | Path, *, split: str = "train"):
        """Raises DataError if the folder of the split has no JSON file, or the explanations are malformed."""
        self.folder, self.split, self.blank = Path(folder), split, 0
        self.path = self.folder / self.folders[split]
        self._files = sorted(self.path.glob("*.json"))
        if not self._files:
            raise DataError(f"{self.path}: no such files as NAME.json and NAME.jpg")
        self.explanations = self._read_explanations() if split == "train" else {}
        self._images = ImageFiles(self.folder)

    @classmethod
    def splits(cls, folder: str | Path) -> list[str]:
        """Return the splits whose folders exist. Raises DataError if there are none."""
        found = [split for split, name in cls.folders.items() if (Path(folder) / name).is_dir()]
        if not found:
            raise DataError(f"{folder}: no such files of {cls.name}; expected the folders train and val")
        return found

    @classmethod
    def record_paths(cls) -> set[str]:
        return {EXPLANATIONS_FILE, *cls.folders.values()}

    @property
    def counts(self) -> dict[str, int]:
        return {"images": len(self), "explanations": len(self.explanations)}

    def __len__(self) -> int:
        return len(self._files)

    def regions(self, index: int) -> tuple[RLE, RLE]:
        """Return the masks of the target and of the region to ignore. Raises DataError that names file and shape."""
        where = str(self._files[index])
        return _paint(self._read(index), size=self._images.size(self._image_path(index), where=where), where=where)

    def conversations(self, index: int, *, seed: int) -> Iterator[GroundedConversation]:
        """Yield a conversation for each text of an image; none without a target. Raises DataError that names file and
        field.
        """
        where, content = str(self._files[index]), self._read(index)
        texts = [" ".join(text.split()) for text in typed_list(content, "text", str, where=where)]
        if not texts or not all(texts):
            raise DataError(f"{where}, field 'text': expected questions, found {texts}")
        target, _ = self.regions(index)
        if not area(target):
            self.blank += 1
            return
        image_path = self._image_path(index)
        example = PartExample(
            image={"bytes": None, "path": str(self._images.locate(image_path, where=where))},
            image_id=f"{self.split}-{Path(image_path).stem}",
            image_label="",
            masks=[],
            source=self.name,
            licence=self.licence,
        )
        is_sentence = typed(content, "is_sentence", bool, where=where)
        for number, text in enumerate(texts):
            asked = replace(example, image_id=f"{example.image_id}-{number}", masks=[PartMask(text, target)])
            if is_sentence:
                yield _reason(asked, self.explanations.get(Path(image_path).name), seed=seed)
            else:
                yield from ask_for_each(asked, seed=seed)

    def _image_path(self, index: int) -> str:
        return f"{self.folders[self.split]}/{self._files[index].stem}.jpg"

    def _read(self, index: int) -> Any:
        path = self._files[index]
        return parse_json(read_text(path, encodings=("utf-8-sig", "cp1252")).encode(), where=str(path))

    def _read_explanations(self) -> dict[str, str]:
        """Return image name -> explanation of its target."""
        path = self.folder / EXPLANATIONS_FILE
        records = read_json(path)
        if not isinstance(records, list):
            raise DataError(f"{path}: expected a list of explanations, found {type(records).__name__}")
        explanations = {}
        for number, record in enumerate(records):
            where = f"{path}, record {number}"
            explanations[typed(record, "image", str, where=where)] = typed(record, "outputs", str, where=where).strip()
        return explanations


def _reason(example: PartExample, explanation: str | None, *, seed: int) -> GroundedConversation:
    rng = seeded_generator(seed, "reasoning", example.image_id)
    words = str(rng.choice(WORDS_FOR_THE_ANSWER))
    question = escape_tags(example.masks[0].label)
    answer = str(rng.choice(ANSWERS)).format(tagged=f"<p>{words}</p>")
    if explanation is not None and rng.random() < 0.5:
        question = f"{question} {rng.choice(ASKING_WHY)}"
        answer = f"{answer} {escape_tags(explanation)}"
    masks = [PartMask(words, example.masks[0].rle)]
    return conversation(example, f"{example.image_id}-reasoned", turn(question, answer), masks)


def _paint(content: Any, *, size: Size, where: str) -> tuple[RLE, RLE]:
    """Return the target and the ignored region. A smaller shape covers a larger one; of equal ones, the later covers
    the earlier.
    """
    shapes = []
    for number, shape in enumerate(typed_list(content, "shapes", dict, where=where)):
        place = f"{where}, record shapes[{number}]"
        named = typed(shape, "label", str, where=place).lower()
        points = typed_list(shape, "points", list, where=place)
        if named == "flag" or len(points) < 3:
            continue
        label = next((label for label in ("ignore", "target") if label in named), None)
        if label is None:
            raise DataError(f"{place}, field 'label': expected target, ignore or flag, found {named!r}")
        polygon = [value for point in points for value in point]
        shapes.append((label, read_polygons([polygon], size=size, where=f"{place}, field 'points'")))
    painted = {label: np.zeros(size, dtype=bool) for label in ("target", "ignore")}
    for label, rle in sorted(shapes, key=lambda shape: -area(shape[1])):
        covered = decode(rle)
        for other, mask in painted.items():
            mask[covered] = other == label
    return encode(painted["target"]), encode(painted["ignore"])
