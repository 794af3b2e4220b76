"""
Training examples of PLUM: grounded conversations with augmentation, and batches of them.

    records of `plum_partonomy.records` ──> ConversationDataset ──> Collator ──> model inputs
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from PIL import Image

from modules_plum import IGNORE_INDEX, TAG_INSIDE
from plum_partonomy.images import read_image, undecoded
from plum_partonomy.masks import RLE, decode, encode, validate_rle
from plum_partonomy.records import DataError, as_chat, check_turns, tagged_phrases
from plum_partonomy.seeding import seeded_generator
from plum_partonomy.training.fresh import FreshRecords
from processing_plum import PlumProcessor
from supervision_plum import MAX_PROMPT_ROUNDS, PROMPT_DRAWS

OF_SPANS = ("teacher_forced", "prompt_rounds", "prompt_draws")
"""Fields of a conversation with an entry for each mask; inputs of the model for the supervised ones."""


@dataclass
class Conversation:
    """
    A conversation of an example.

    Attributes:
        messages: Its turns, with span tags.
        masks: The mask of each span tag as RLE at the size of the image; decoded masks of a photograph would dominate
            the memory.
        tagged: Whether the answers give supervision of tags.
        chosen: Sorted indices of the supervised masks.
        teacher_forced: Whether the true mask is fed back, bool (masks,).
        prompt_rounds: Number of decodes with prompts, (masks,).
        prompt_draws: Random numbers of their prompts, (masks, PROMPT_DRAWS).
    """

    messages: list[dict]
    masks: list[RLE]
    tagged: bool
    chosen: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    teacher_forced: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    prompt_rounds: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    prompt_draws: np.ndarray = field(default_factory=lambda: np.zeros((0, PROMPT_DRAWS), np.float32))


@dataclass(frozen=True)
class ExampleMaker:
    """
    Converts a record (see `plum_partonomy.records`) to an example.

    Args:
        jitter: Maximum relative change of each colour channel.
        crop: Maximum share of each side that is cut off; boxes that lose more than half of a mask are rejected.
        affine: Maximum entry by which a linear map of the image differs from the identity (see [`random_affine`]).
        turns_per_record: Number of random turns, 0 for all, each as a separate conversation; None: one conversation.
        follow_up_probability: Probability that such a turn comes second in its conversation, after another random
            turn.
        max_spans: Maximum number of supervised masks of a record, chosen at random.
        teacher_forcing_probability: Probability of feeding back the true mask of a span instead of the predicted one.
        prompt_probability: Probability of decoding the mask of a span again with random prompts.
    """

    jitter: float = 0.0
    crop: float = 0.0
    affine: float = 0.0
    turns_per_record: int | None = None
    follow_up_probability: float = 0.0
    max_spans: int | None = None
    teacher_forcing_probability: float = 0.0
    prompt_probability: float = 0.0

    def __call__(self, record: dict, generator: np.random.Generator) -> dict:
        """
        Return the example of a record.

        Returns:
            `id`, `image` (RGB or None) and `conversations`: a dict, because streams of `datasets` have no other rows.

        Raises:
            DataError: Turns, tags, masks and image do not match; the message names record and field.
        """
        image = record["image"]
        if image is not None:
            image = read_image(image, where=f"record {record['id']}, field 'image'")
        masks = check_masks(record, image)
        if image is not None:
            if self.jitter:
                gain, offset = generator.uniform(-self.jitter, self.jitter, (2, 3))
                pixels = np.asarray(image, dtype=np.float32) * (1 + gain) + 128 * offset
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            if self.affine or self.crop:
                decoded = [decode(rle) for rle in masks]
                if self.affine:
                    image, decoded = random_affine(image, decoded, self.affine, generator)
                if self.crop:
                    image, decoded = random_crop(image, decoded, self.crop, generator)
                masks = [encode(mask) for mask in decoded]
        conversations = [Conversation(record["messages"], masks, tagged=record["masks"] is not None)]
        if self.turns_per_record is not None:
            conversations = self._draw_turns(split_into_turns(conversations[0]), generator)
        self._choose_spans(conversations, generator)
        for conversation in conversations:
            draws = generator.random(len(conversation.masks))
            conversation.teacher_forced = draws < self.teacher_forcing_probability
        for conversation in conversations:
            chance, length, *draws = generator.random((2 + PROMPT_DRAWS, len(conversation.masks)))
            rounds = 1 + (MAX_PROMPT_ROUNDS * length).astype(int)
            conversation.prompt_rounds = np.where(chance < self.prompt_probability, rounds, 0)
            conversation.prompt_draws = np.stack(draws, axis=1).astype(np.float32)
        return {"id": record["id"], "image": image, "conversations": conversations}

    def _draw_turns(self, turns: list[Conversation], generator: np.random.Generator) -> list[Conversation]:
        """Return some of the turns, each alone or as the follow-up of another one."""
        count = min(self.turns_per_record or len(turns), len(turns))
        conversations = []
        for i in generator.permutation(len(turns))[:count].tolist():
            turn = turns[i]
            if len(turns) > 1 and self.follow_up_probability and generator.random() < self.follow_up_probability:
                before = turns[(i + generator.integers(1, len(turns))) % len(turns)]
                turn = Conversation(before.messages + turn.messages, before.masks + turn.masks, turn.tagged)
            conversations.append(turn)
        return conversations

    def _choose_spans(self, conversations: list[Conversation], generator: np.random.Generator):
        """Set the supervised masks of each conversation: those of whole conversations while they fit."""
        left = sum(len(conversation.masks) for conversation in conversations)
        left = left if self.max_spans is None else min(left, self.max_spans)
        for i in generator.permutation(len(conversations)):
            count = len(conversations[i].masks)
            chosen = generator.choice(count, min(count, left), replace=False)
            conversations[i].chosen, left = np.sort(chosen), left - len(chosen)


def random_crop(
    image: Image.Image, masks: list[np.ndarray], largest: float, generator: np.random.Generator, attempts: int = 10
) -> tuple[Image.Image, list[np.ndarray]]:
    """
    Return a random box of the image, and the masks in it, bool arrays (height, width).

    At most `largest` of each side is cut off, and each mask keeps half of its area, so that parts that the
    conversation calls visible stay visible. After `attempts` failed boxes the image is unchanged.
    """
    frame, areas = np.array([image.height, image.width]), [mask.sum() for mask in masks]
    for _ in range(attempts):
        share, place = 1 - generator.uniform(0, largest, 2), generator.uniform(0, 1, 2)
        size = np.maximum(1, (share * frame).astype(int))
        top, left = (place * (frame - size)).astype(int).tolist()
        bottom, right = (size + (top, left)).tolist()
        cropped = [mask[top:bottom, left:right] for mask in masks]
        if all(2 * inside.sum() >= whole for inside, whole in zip(cropped, areas, strict=True)):
            return image.crop((left, top, right, bottom)), cropped
    return image, masks


def random_affine(
    image: Image.Image, masks: list[np.ndarray], largest: float, generator: np.random.Generator, attempts: int = 10
) -> tuple[Image.Image, list[np.ndarray]]:
    """
    Return the image and its masks, stretched, rotated and sheared about the centre.

    The map from new pixels to old ones is the identity plus a number within `largest` in each of its four entries. As
    in [`random_crop`], each mask keeps half of its area, and after `attempts` failed maps the image is unchanged.
    """
    areas, centre = [mask.sum() for mask in masks], np.array(image.size) / 2
    pictures = [Image.fromarray(mask) for mask in masks]
    for _ in range(attempts):
        matrix = np.eye(2) + generator.uniform(-largest, largest, (2, 2))
        shift = centre - matrix @ centre
        move = {"size": image.size, "method": Image.Transform.AFFINE}
        move["data"] = (*matrix[0], shift[0], *matrix[1], shift[1])
        moved = [np.asarray(picture.transform(**move)) for picture in pictures]
        scale = np.linalg.det(matrix)  # ratio of old to new areas
        if all(2 * scale * mask.sum() >= whole for mask, whole in zip(moved, areas, strict=True)):
            mean_colour = tuple(np.asarray(image).mean((0, 1)).astype(int).tolist())
            image = image.transform(**move, resample=Image.Resampling.BILINEAR, fillcolor=mean_colour)
            return image, moved
    return image, masks


class ConversationDataset(torch.utils.data.Dataset):
    """
    Examples with augmentation that depends only on seed, epoch and index: the same for any number of processes and
    workers, and after a resume. `options` are those of [`ExampleMaker`].
    """

    def __init__(self, records: Dataset, seed: int = 0, **options):
        self.records, self.seed = undecoded(records), seed
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # persistent workers keep their data set
        self.make_example = ExampleMaker(**options)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int):
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return self.make_example(self._read(index), np.random.default_rng([self.seed, self.epoch, index]))

    def _read(self, index: int) -> dict:
        return self.records[index]


class FreshConversationDataset(ConversationDataset):
    """
    As [`ConversationDataset`], with new records in every epoch, made when they are read.

    Args:
        places: The columns `part` and `row`, in the order of the mixture.
        makers: For each part, the maker of its records (see `plum_partonomy.training.fresh`).
    """

    def __init__(self, places: Dataset, makers: Sequence[FreshRecords], seed: int = 0, **options):
        super().__init__(places, seed, **options)
        self.makers = makers

    def _read(self, index: int) -> dict:
        place = self.records[index]
        return self.makers[place["part"]](place["row"], self.epoch * len(self) + index)


def stream_examples(records: IterableDataset, seed: int = 0, **options) -> IterableDataset:
    """
    Return the examples of a stream.

    The augmentation depends on seed, record and position in this worker's part of the stream: the same after a resume
    with the same number of processes and workers.
    """
    make_example = ExampleMaker(**options)

    def make(record: dict, position: int) -> dict:
        return make_example(record, seeded_generator(seed, record["id"], position))

    return undecoded(records).map(make, with_indices=True, remove_columns=["messages", "masks"])


def check_masks(record: dict, image: Image.Image | None) -> list[RLE]:
    """Return the masks of a record. Raises `DataError` that names record and field if they do not match."""
    where = f"record {record['id']}"
    masks = record["masks"] or []
    check_turns(record["messages"], len(masks), where=where)
    if image is None and masks:
        raise DataError(f"{where}, field 'image': expected an image for {len(masks)} masks, found none")
    return [
        validate_rle(mask["rle"], expected_size=(image.height, image.width), where=f"{where}, field 'masks[{i}]'")
        for i, mask in enumerate(masks)
    ]


def split_into_turns(conversation: Conversation) -> list[Conversation]:
    """Return each question with its answer as a separate conversation, with the masks of its span tags."""
    turns, start = [], 0
    for question, answer in zip(conversation.messages[::2], conversation.messages[1::2], strict=True):
        end = start + len(tagged_phrases(answer["content"]))
        turns.append(Conversation([question, answer], conversation.masks[start:end], conversation.tagged))
        start = end
    return turns


NOTHING = Conversation([{"role": role, "content": "-"} for role in ("user", "assistant")], masks=[], tagged=False)
"""Placeholder for a batch without conversations; no loss is computed on it."""


class Collator:
    """
    Collates examples to a batch of model inputs: a row per conversation, with the chosen masks only.
    `record_index` `(B,)` is the example of each row, `record_ids` are the ids of the examples, and `record_counts` the
    numbers of rows that were cut and left out.

    Args:
        processor: The processor of the trained model.
        max_length: Maximum number of tokens of a row, including image tokens. A longer conversation is cut, or left
            out if its first question does not fit.
        order_free_targets: Spans of one answer with the same words may take their masks in any order.
    """

    def __init__(self, processor: PlumProcessor, max_length: int | None = None, *, order_free_targets: bool = False):
        self.processor, self.max_length = processor, max_length
        self.order_free_targets = order_free_targets

    def __call__(self, examples: list[dict]) -> dict:
        rows = [(i, conversation) for i, example in enumerate(examples) for conversation in example["conversations"]]
        images = [example["image"] for example in examples]
        batch, cut, left_out = self._encode(rows, images), [], []
        if self.max_length is not None and batch["input_ids"].shape[1] > self.max_length:
            cut, left_out = cut_answers(batch, self.max_length, pad_token_id=self._pad_token_id)
        if left_out:
            fitting = [row for number, row in enumerate(rows) if number not in left_out]
            # A process without a row would block the others.
            batch = self._encode(fitting or [(0, NOTHING)], images if fitting else [None])
            if not fitting:
                batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
            cut_answers(batch, self.max_length, pad_token_id=self._pad_token_id)
        batch["record_ids"] = [example["id"] for example in examples]
        batch["record_counts"] = {"cut": len(cut), "left_out": len(left_out)}
        return batch

    @property
    def _pad_token_id(self) -> int:
        return self.processor.tokenizer.pad_token_id or 0

    def _encode(self, rows: list[tuple[int, Conversation]], images: list) -> dict:
        """Return a batch of conversations, each with the index of its image."""
        batch = self.processor.apply_chat_template(
            [as_chat(conversation.messages, images[i]) for i, conversation in rows],
            masks=[conversation.masks if conversation.tagged else None for _, conversation in rows],
            tokenize=True,
            return_dict=True,
            padding_side="right",
        )
        chosen, start = [], 0
        for _, conversation in rows:
            chosen += (start + conversation.chosen).tolist()
            start += len(conversation.masks)
        batch["spans"] = batch["spans"][chosen]
        for name in OF_SPANS:
            drawn = np.concatenate([getattr(conversation, name) for _, conversation in rows])
            batch[name] = torch.from_numpy(drawn)[chosen]
        groups = torch.arange(len(batch["mask_labels"]))
        if self.order_free_targets:
            groups = torch.tensor(group_masks([conversation.messages for _, conversation in rows]))
        batch["span_groups"] = groups[chosen]
        # Unsupervised masks of an answer stay candidates for its supervised spans with the same words.
        candidates = torch.isin(groups, batch["span_groups"]).nonzero()[:, 0].tolist()
        batch["mask_groups"] = groups[candidates]
        batch["mask_labels"] = [batch["mask_labels"][i] for i in candidates]
        batch["record_index"] = torch.tensor([i for i, _ in rows])
        return dict(batch)


def group_masks(conversations: list[list[dict]]) -> list[int]:
    """Return the group index of each mask of the conversations: spans of one answer with the same words."""
    numbers: dict[tuple, int] = {}
    groups = []
    for row, messages in enumerate(conversations):
        for turn, answer in enumerate(messages[1::2]):
            keys = [(row, turn, phrase) for phrase in tagged_phrases(answer["content"])]
            groups += [numbers.setdefault(key, len(numbers)) for key in keys]
    return groups


def cut_answers(batch: dict, max_length: int, *, pad_token_id: int) -> tuple[list[int], list[int]]:
    """
    Cut a right-padded batch to its first `max_length` tokens, in place. A longer row ends at the last answer token
    within the limit that does not split a tagged span, and loses the later spans and masks.

    Returns:
        The indices of the rows that were cut, and of those to leave out because no answer starts within the limit.
    """
    answered = batch["labels"] != IGNORE_INDEX
    inside_span = batch["span_labels"] == TAG_INSIDE
    kept, cut_rows, left_out = batch["attention_mask"].sum(1), [], []
    for row in (kept > max_length).nonzero()[:, 0].tolist():
        end = max_length
        while inside_span[row, end]:
            end -= 1
        ends = answered[row, :end].nonzero()[:, 0] + 1
        (cut_rows if len(ends) else left_out).append(row)
        kept[row] = ends[-1] if len(ends) else end
    cut = torch.arange(answered.shape[1]) >= kept[:, None]  # (B, L)
    fills = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX, "span_labels": IGNORE_INDEX}
    fills |= {name: 0 for name in batch if name.endswith("token_type_ids")}
    for name, fill in fills.items():
        batch[name] = batch[name].masked_fill(cut, fill)[:, : kept.max()]
    inside = batch["spans"][:, 2] <= kept[batch["spans"][:, 0]]
    for name in ("spans", "span_groups", *OF_SPANS):
        batch[name] = batch[name][inside]
    kept_masks = torch.isin(batch["mask_groups"], batch["span_groups"])
    batch["mask_groups"] = batch["mask_groups"][kept_masks]
    batch["mask_labels"] = [batch["mask_labels"][i] for i in kept_masks.nonzero()[:, 0].tolist()]
    return cut_rows, left_out
