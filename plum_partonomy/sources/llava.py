"""Read chats about images: LLaVA-Instruct-150k and the mixture of 665,000 chats for LLaVA 1.5.

One record of either list:

    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat are the colours of the bus?"},
                       {"from": "gpt", "value": "The bus is white and red."}, ...]}

    FOLDER/llava_instruct_150k.json  FOLDER/coco/train2017/000000033471.jpg (the file names no folder)
    FOLDER/llava_v1_5_mix665k.json  FOLDER/coco/train2017/  FOLDER/gqa/images/  FOLDER/ocr_vqa/images/
                                    FOLDER/textvqa/train_images/  FOLDER/vg/VG_100K/  FOLDER/vg/VG_100K_2/

Texts are unchanged except for the image placeholder: the image comes before the first question, wherever its
placeholder was. In chats without an image, text that looks like the placeholder or another special token is source
code under discussion; a blank is inserted into it. A chat that starts with the assistant or ends with the user loses
that message, and is counted in `blank` if nothing is left.

The answers contain no tags, so `masks` is None and the chats give no supervision of tags.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from plum_partonomy.masks import DataError
from plum_partonomy.records import GroundedConversation, defuse, escape_tags
from plum_partonomy.sources.json_files import stream_records
from plum_partonomy.sources.untrusted import ImageFiles, find_existing, find_file, typed, typed_list

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}


class LlavaChats:
    """The chats of one file. Records stay in memory as JSON, a little more than the size of the file."""

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    """Possible paths of the file."""
    image_folders: ClassVar[tuple[str, ...]]
    licence: ClassVar[str] = "CC BY 4.0; images under the terms of their sources"
    published_counts: ClassVar[dict[str, dict[str, int]]] = {}

    def __init__(self, folder: str | Path, *, split: str = "train"):
        """Raises DataError if the file is missing or is not a JSON list."""
        self.folder, self.split, self.blank = Path(folder), split, 0
        self.path = self._find(self.folder)
        self._records = [json.dumps(record) for record in stream_records(self.path)]
        if not self._records:
            raise DataError(f"{self.path}: expected a non-empty list of chats, found none")
        self._images = ImageFiles(self.folder, field="image")

    @classmethod
    def splits(cls, folder: str | Path) -> list[str]:
        """Return ["train"]. Raises DataError if the file is missing."""
        cls._find(Path(folder))
        return ["train"]

    @classmethod
    def _find(cls, folder: Path) -> Path:
        return find_existing(folder, cls.files, what=f"the chats of {cls.name}")

    @classmethod
    def record_paths(cls) -> set[str]:
        return set(cls.files)

    @property
    def counts(self) -> dict[str, int]:
        return {"chats": len(self)}

    def __len__(self) -> int:
        return len(self._records)

    def conversations(self, index: int, *, seed: int) -> Iterator[GroundedConversation]:
        """Yield the chat of a record; the seed has no effect. Raises DataError that names file, record and field."""
        where, record = f"{self.path}, record {index}", json.loads(self._records[index])
        image = self._image(record, where=where)
        messages = _messages(record, has_image=image is not None, where=where)
        if not messages:
            self.blank += 1
            return
        made = GroundedConversation(
            id=f"{self.name}-{index:06d}",
            image=image,
            image_id=record.get("image") or "",
            image_label="",
            messages=messages,
            masks=None,
            source=self.name,
            licence=self.licence,
        )
        made.validate(where=where)
        yield made

    def _image(self, record: Any, *, where: str) -> dict[str, Any] | None:
        if not isinstance(record, dict) or record.get("image") is None:
            return None
        name = typed(record, "image", str, where=where)
        names = [f"{folder}/{name}" if folder else name for folder in self.image_folders]
        image_path = find_file(self.folder, names) or names[0]
        self._images.size(image_path, where=where)
        return {"bytes": None, "path": str(self._images.locate(image_path, where=where))}


class LlavaInstruct(LlavaChats):
    """LLaVA-Instruct-150k: chats, descriptions and reasoning about COCO images."""

    name = "llava_instruct_150k"
    files = ("llava_instruct_150k.json", "llava_dataset/llava_instruct_150k.json")
    image_folders = ("coco/train2017", "images/train2017", "train2017")


class LlavaMixture(LlavaChats):
    """The mixture of LLaVA 1.5: the chats above, questions of several data sets, and chats without images."""

    name = "llava_v1_5_mix665k"
    files = ("llava_v1_5_mix665k.json", "llava_dataset/llava_v1_5_mix665k.json")
    image_folders = ("",)


def _messages(record: Any, *, has_image: bool, where: str) -> list[dict[str, str]]:
    messages = []
    for number, message in enumerate(typed_list(record, "conversations", dict, where=where)):
        place = f"{where}, record conversations[{number}]"
        speaker, text = typed(message, "from", str, where=place), typed(message, "value", str, where=place)
        if speaker not in ROLES:
            raise DataError(f"{place}, field 'from': expected human or gpt, found {speaker!r}")
        if PLACEHOLDER in text:
            text = text.replace(PLACEHOLDER, "").strip() if has_image else text
        messages.append({"role": ROLES[speaker], "content": escape_tags(defuse(text))})
    opening = bool(messages) and messages[0]["role"] == "assistant"
    ending = bool(messages) and messages[-1]["role"] == "user"
    return messages[opening : len(messages) - ending]
