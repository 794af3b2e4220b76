"""
Training examples of PLUM: grounded conversations with random changes, and batches of them.

    records of `partkit.schema` ──> ConversationDataset ──> Collator ──> model inputs
"""

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from partkit.images import to_rgb
from partkit.masks import decode as decode_rle
from partkit.schema import DataError, as_chat, tagged_phrases
from processing_plum import PlumProcessor


class ConversationDataset(torch.utils.data.Dataset):
    """
    Grounded conversations (see `partkit.schema`) with random changes that depend on seed, epoch and index alone: the
    same for any number of processes and workers, and after a resume.
    """

    def __init__(
        self,
        records: Dataset,
        seed: int = 0,
        jitter: float = 0.0,
        turns_per_record: int | None = None,
        max_spans: int | None = None,
    ):
        self.records, self.seed, self.epoch = records, seed, 0
        self.jitter, self.turns_per_record, self.max_spans = jitter, turns_per_record, max_spans

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        record, masks = self._read(index)
        generator = np.random.default_rng([self.seed, self.epoch, index])
        image = record["image"]
        if image is not None:
            image = to_rgb(image, where=f"record {record['id']}, field 'image'")
            if self.jitter:
                gain, offset = generator.uniform(-self.jitter, self.jitter, (2, 3))
                pixels = np.asarray(image, dtype=np.float32) * (1 + gain) + 128 * offset
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        conversations = [{"messages": record["messages"], "masks": masks}]
        if self.turns_per_record is not None:
            conversations = split_into_turns(record["messages"], masks)
            count = min(self.turns_per_record or len(conversations), len(conversations))
            conversations = [conversations[i] for i in generator.permutation(len(conversations))[:count]]
        self._choose_spans(conversations, generator)
        return {"id": record["id"], "image": image, "conversations": conversations}

    def _choose_spans(self, conversations: list[dict], generator: np.random.Generator):
        """Sets which masks of each conversation are supervised: those of whole conversations while they fit."""
        left = sum(len(conversation["masks"]) for conversation in conversations)
        left = left if self.max_spans is None else min(left, self.max_spans)
        for i in generator.permutation(len(conversations)):
            count = len(conversations[i]["masks"])
            chosen = generator.choice(count, min(count, left), replace=False)
            conversations[i]["chosen"], left = np.sort(chosen), left - len(chosen)

    def _read(self, index: int) -> tuple[dict, list[np.ndarray]]:
        """A record and its masks; `DataError` naming the record and the field if they do not fit together."""
        try:
            record = self.records[index]
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            identity = self.records.select_columns("id")[index]["id"]
            raise DataError(f"record {identity}, field 'image': the image cannot be read: {error}") from error
        where, image = f"record {record['id']}", record["image"]
        answers = [message["content"] for message in record["messages"] if message["role"] == "assistant"]
        tags = sum(len(tagged_phrases(answer, where=f"{where}, field 'messages'")) for answer in answers)
        if tags != len(record["masks"]):
            raise DataError(
                f"{where}, field 'masks': expected one mask for each of {tags} span tags, found {len(record['masks'])}"
            )
        if image is None and tags:
            raise DataError(f"{where}, field 'image': expected an image for {tags} masks, found none")
        masks = [
            decode_rle(mask["rle"], expected_size=(image.height, image.width), where=f"{where}, field 'masks[{i}]'")
            for i, mask in enumerate(record["masks"])
        ]
        return record, masks


def split_into_turns(messages: list[dict], masks: list[np.ndarray]) -> list[dict]:
    """Each question with its answer as a conversation of its own, with the masks of its own span tags."""
    turns, start = [], 0
    for question, answer in zip(messages[::2], messages[1::2], strict=True):
        end = start + len(tagged_phrases(answer["content"]))
        turns.append({"messages": [question, answer], "masks": masks[start:end]})
        start = end
    return turns


class Collator:
    """
    Examples of a [`ConversationDataset`] to a batch of model inputs, a row per conversation, without the masks that
    were not chosen. `record_index` `(B,)` says which example a row belongs to.
    """

    def __init__(self, processor: PlumProcessor):
        self.processor = processor

    def __call__(self, examples: list[dict]) -> dict:
        rows = [(i, conversation) for i, example in enumerate(examples) for conversation in example["conversations"]]
        batch = self.processor.apply_chat_template(
            [as_chat(conversation["messages"], examples[i]["image"]) for i, conversation in rows],
            masks=[conversation["masks"] for _, conversation in rows],
            tokenize=True,
            return_dict=True,
            padding_side="right",
        )
        chosen, start = [], 0
        for _, conversation in rows:
            chosen += (start + conversation["chosen"]).tolist()
            start += len(conversation["masks"])
        batch["spans"] = batch["spans"][chosen]
        batch["mask_labels"] = [batch["mask_labels"][i] for i in chosen]
        batch["record_index"] = torch.tensor([i for i, _ in rows])
        return dict(batch)
