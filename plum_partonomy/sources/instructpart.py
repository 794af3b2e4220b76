"""Read InstructPart (arXiv 2505.18291): images, instructions, and the object parts that they refer to.

One record of `data_test.json`, shortened (licence: MIT, by the publishers' repository):

    {"image_path": "cup1.jpg", "part_list": [
      {"object": "cup", "part": "handle", "affordance": "hold", "action": "pick up",
       "instruction": ["If I want to pick up the cup, which part should I hold?", "GPT-4's words for the same",
                       "Where is the handle of the cup?", "Where is the handle of the cup that can be held?",
                       "handle of the cup", "handle of the cup that can be held"]}]}

    FOLDER/train/train1800/data_train.json  FOLDER/train/train1800/images/  FOLDER/train/train1800/masks/
    FOLDER/test/data_test.json              FOLDER/test/images/             FOLDER/test/masks/

The image and mask files of an entry of `part_list` are named "cup1-cup-handle", with underscores for blanks in
object and part; an image may also have its own name. A mask is a grey image whose part pixels are not 0 (in a JPEG:
brighter than 127).

`instructpart` asks with the instruction written by a person, and the answer names the part. `instructpart_names` asks
with the name of the part, "handle of the cup", as in the published comparison of the two.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import ClassVar

from plum_partonomy.masks import DataError, area, encode
from plum_partonomy.questions.conversations import conversation, turn
from plum_partonomy.records import GroundedConversation, PartExample, PartMask, check_plain, escape_tags
from plum_partonomy.seeding import seeded_generator
from plum_partonomy.sources.json_files import read_json
from plum_partonomy.sources.untrusted import ImageFiles, find_existing, find_file, typed, typed_list

__all__ = ["InstructPart", "InstructPartNames"]

ANSWERS = (
    "It is {tagged}.",
    "Look at {tagged}.",
    "That would be {tagged}.",
    "{tagged}.",
    "You need {tagged}.",
    "The part in question is {tagged}.",
)
JPEG_THRESHOLD = 127
INSTRUCTIONS = 6


class InstructPart:
    """One open split with task instructions. The list is read on opening, masks and images on access."""

    name: ClassVar[str] = "instructpart"
    licence: ClassVar[str] = "MIT"
    instruction: ClassVar[int] = 0
    """Index of the instruction of an entry that is used as the question."""
    files: ClassVar[dict[str, str]] = {"train": "train/train1800/data_train.json", "test": "test/data_test.json"}
    published_counts: ClassVar[dict[str, dict[str, int]]] = {"train": {"samples": 1800}, "test": {"samples": 600}}

    def __init__(self, folder: str | Path, *, split: str = "train"):
        """Raises DataError if the file of the split is missing or not a list; a bad record raises when it is read."""
        self.folder, self.split, self.blank = Path(folder), split, 0
        self.path = find_existing(self.folder, [self.files[split]], what=f"the split {split} of {self.name}")
        records = read_json(self.path)
        if not isinstance(records, list):
            raise DataError(f"{self.path}: expected a list of records, found {type(records).__name__}")
        self._entries: list[tuple[str, str, dict] | DataError] = []
        for number, record in enumerate(records):
            where = f"{self.path}, record {number}"
            try:
                image_path = typed(record, "image_path", str, where=where)
                entries = typed_list(record, "part_list", dict, where=where)
            except DataError as error:
                self._entries.append(error)
                continue
            self._entries += [(f"{where}, part_list[{n}]", image_path, entry) for n, entry in enumerate(entries)]
        self._images = ImageFiles(self.folder)

    @classmethod
    def splits(cls, folder: str | Path) -> list[str]:
        """Return the splits whose files exist. Raises DataError if there are none."""
        found = [split for split, name in cls.files.items() if (Path(folder) / name).is_file()]
        if not found:
            expected = " or ".join(cls.files.values())
            raise DataError(f"{folder}: no such files of {cls.name}; expected {expected}")
        return found

    @classmethod
    def record_paths(cls) -> set[str]:
        return set(cls.files.values())

    @property
    def counts(self) -> dict[str, int]:
        return {"samples": len(self)}

    def __len__(self) -> int:
        return len(self._entries)

    def conversations(self, index: int, *, seed: int) -> Iterator[GroundedConversation]:
        """Yield the conversation about an entry; none if its mask is empty. Raises DataError that names file, record
        and field.
        """
        found = self._entries[index]
        if isinstance(found, DataError):
            raise found
        where, image_name, entry = found
        label, part = (typed(entry, field, str, where=where).strip() for field in ("object", "part"))
        named = f"{label}-{part}".replace(" ", "_")
        stem = f"{PurePosixPath(image_name).stem}-{named}"
        image_path = self._find("images", [f"{stem}.jpg", f"{stem}.png", image_name], where=where)
        instructions = typed_list(entry, "instruction", str, where=where)
        if len(instructions) != INSTRUCTIONS or not instructions[self.instruction].strip():
            raise DataError(
                f"{where}, field 'instruction': expected {INSTRUCTIONS} texts, found {instructions!r:.200}"
            )
        phrase = f"{part} of the {label}"
        for text in (instructions[self.instruction], phrase):
            check_plain(text, where=where)
        mask = self._mask(stem, image_path, phrase, where=where)
        if not area(mask.rle):
            self.blank += 1
            return
        example = PartExample(
            image={"bytes": None, "path": str(self._images.locate(image_path, where=where))},
            image_id=f"{self.split}-{stem}",
            image_label=label,
            masks=[mask],
            source=self.name,
            licence=self.licence,
        )
        rng = seeded_generator(seed, self.name, self.split, stem)
        tagged = f"the <p>{escape_tags(phrase)}</p>"
        answer = ANSWERS[rng.integers(len(ANSWERS))].format(tagged=tagged)
        messages = turn(escape_tags(instructions[self.instruction].strip()), answer[0].upper() + answer[1:])
        yield conversation(example, f"{example.image_id}-{index}", messages, example.masks)

    def _mask(self, stem: str, image_path: str, label: str, *, where: str) -> PartMask:
        path = self._find("masks", [f"{stem}.png", f"{stem}.jpg"], where=where)
        values = self._images.label_map(path, where=where)
        self._images.check_frame(image_path, values.shape, where=f"{where}, mask {path!r}")
        return PartMask(label, encode(values > (JPEG_THRESHOLD if path.endswith(".jpg") else 0)))

    def _find(self, folder: str, names: list[str], *, where: str) -> str:
        """Return the first existing file beside the list of records, relative to the folder of the data set."""
        place = PurePosixPath(self.files[self.split]).parent / folder
        candidates = [str(place / name) for name in names]
        if (path := find_file(self.folder, candidates)) is None:
            raise DataError(f"{where}: there is no {' nor '.join(candidates)} in {self.folder}")
        return path


class InstructPartNames(InstructPart):
    """The same parts, asked for by their names."""

    name = "instructpart_names"
    instruction = 4
