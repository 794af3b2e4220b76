"""Read your own grounded conversations: one JSON object per line with the fields of `records.GroundedConversation`.

One record, on several lines here (licence: its field `licence`):

    {"id": "0007", "image": "images/0007.jpg",
     "messages": [{"role": "user", "content": "What holds the bike upright?"},
                  {"role": "assistant", "content": "The <p>kickstand</p> below the <p>crank</p>."}],
     "masks": [{"label": "kickstand", "rle": {"size": [480, 640], "counts": "kV]12k?3N3L..."}},
               {"label": "crank", "rle": {"size": [480, 640], "counts": "Yc?5m96K4L3N2..."}}]}

`masks[i]` belongs to the i-th tag of the conversation. `image` is relative to the folder of the file, or null for a
conversation without an image. `image_id`, `image_label`, `source` and `licence` are optional.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plum_partonomy.masks import DataError, area, validate_rle
from plum_partonomy.records import UNNAMED_OBJECT, GroundedConversation, PartMask, check_plain
from plum_partonomy.sources.descriptor import hold_out
from plum_partonomy.sources.json_files import json_lines, parse_json
from plum_partonomy.sources.untrusted import ImageFiles, OnError, refuse, typed, typed_list

OPTIONAL_FIELDS = {"image_id": "", "image_label": UNNAMED_OBJECT, "source": "own_parts", "licence": "not stated"}
FIELDS = {"id", "image", "messages", "masks", *OPTIONAL_FIELDS}


class ConversationFile:
    """A file of conversations. Lines and ids are checked on opening; conversations, masks and images on access."""

    def __init__(self, path: Path, *, on_error: OnError = refuse):
        """Args:
            on_error: Receives a DataError for each bad line. Blank lines are skipped.

        Raises:
            DataError: The file is too large or has no record.
        """
        self.path = path
        self._records: list[tuple[str, dict[str, Any]]] = []
        self._images = ImageFiles(path.parent, field="image")
        places: dict[str, str] = {}
        for where, line in json_lines(path):
            try:
                record = _parse(line, where=where)
                id = typed(record, "id", str, where=where)
                typed(record, "image", (str, type(None)), where=where)
                if places.setdefault(id, where) != where:
                    raise DataError(f"{where}, field 'id': {id!r} is also the id of {places[id]}")
                self._records.append((where, record))
            except DataError as error:
                on_error(error)
        if not self._records:
            raise DataError(f"{path}: expected one JSON object per line, found none that can be used")

    def __len__(self) -> int:
        return len(self._records)

    def image_path(self, index: int) -> str | None:
        """Return the image path of a conversation, relative to the folder of the file, or None without an image."""
        given = self._records[index][1]["image"]
        return None if given is None else self._images.spell(given)

    def splits(self, *, seed: int) -> dict[str, list[int]]:
        """Return split -> indices, see `hold_out`. A conversation without an image counts as a separate image."""
        return hold_out([self.image_path(index) or f"record {index}" for index in range(len(self))], seed=seed)

    def conversations(self, index: int, *, seed: int) -> Iterator[GroundedConversation]:
        """Yield the conversation of a line; the seed has no effect. Raises DataError."""
        yield self.example(index)

    def example(self, index: int) -> GroundedConversation:
        """Return the conversation of a line. Raises DataError that names file, line and field."""
        where, record = self._records[index]
        messages = typed_list(record, "messages", dict, where=where)
        for number, message in enumerate(messages):
            place = f"{where}, field 'messages[{number}]'"
            if message.keys() - {"role", "content"}:
                raise DataError(f"{place}: expected 'role' and 'content', found {sorted(message)}")
            typed(message, "role", str, where=place)
            check_plain(typed(message, "content", str, where=place), where=f"{place}, field 'content'")
        image_path = self.image_path(index)
        if image_path is not None:
            self._images.size(image_path, where=where)
        further = {name: typed(OPTIONAL_FIELDS | record, name, str, where=where) for name in OPTIONAL_FIELDS}
        conversation = GroundedConversation(
            id=record["id"],
            image=None,
            messages=messages,
            masks=[self._mask(mask, image_path, place) for place, mask in self._masks(record, where)],
            **{**further, "image_id": further["image_id"] or image_path or record["id"]},
        )
        conversation.validate(where=where)
        if image_path is not None:
            conversation.image = {"bytes": None, "path": str(self._images.locate(image_path, where=where))}
        return conversation

    def _masks(self, record: dict[str, Any], where: str) -> list[tuple[str, dict[str, Any]]]:
        masks = typed_list(record, "masks", dict, where=where)
        return [(f"{where}, field 'masks[{number}]'", mask) for number, mask in enumerate(masks)]

    def _mask(self, mask: dict[str, Any], image_path: str | None, where: str) -> PartMask:
        if image_path is None:
            raise DataError(f"{where}: a mask, but the field 'image' is null")
        rle = validate_rle(typed(mask, "rle", dict, where=where), where=where)
        self._images.check_frame(image_path, rle["size"], where=where)
        if not area(rle):
            raise DataError(f"{where}: the mask covers no pixel; leave out its tag and the mask")
        return PartMask(typed(mask, "label", str, where=where), rle)


def _parse(line: bytes, *, where: str) -> dict[str, Any]:
    record = parse_json(line, where=where)
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with the fields of a conversation, found {record!r:.80}")
    unknown = sorted(record.keys() - FIELDS)
    if unknown:
        raise DataError(f"{where}: unknown fields {unknown}; known are {sorted(FIELDS)}")
    return record
