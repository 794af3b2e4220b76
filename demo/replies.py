"""Bounded storage of the last answers of all users, and of those before; the least recently used are dropped first."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from plum_partonomy.inference.one_image import Range, Reply
from plum_partonomy.masks import DataError

KEPT_REPLIES = 1024
KEPT_BYTES = 10**9
UNDO_STEPS = 20
"""Maximum number of changes of an answer that can be undone."""


class Ticket:
    """Represents an answer in a session. When the session drops it, the answer is deleted."""

    def __deepcopy__(self, memo: dict) -> "Ticket":
        return self


@dataclass(frozen=True)
class Shown:
    """
    An answer on a user's page.

    Args:
        model: Name of the checkpoint that generated it.
        reply: The answer; its text is the model's, followed by words of the user.
        written: Number of characters written by the model.
        colours: Colour number of each span, by its characters; unchanged when spans are added.
        before: The answer restored by "undo".
        corrected: Characters of the span whose mask the user corrected last.
    """

    model: str
    reply: Reply
    written: int
    colours: dict[Range, int] = field(default_factory=dict)
    before: Ticket | None = None
    corrected: Range | None = None


def add_colours(colours: dict[Range, int], ranges: Sequence[Range]) -> dict[Range, int]:
    """Return the colours of the ranges: unchanged for known ranges, the first free colour for new ones.

    >>> add_colours({(0, 5): 0, (9, 12): 1}, [(0, 5), (20, 24)])
    {(0, 5): 0, (20, 24): 1}
    """
    kept = {place: colours[place] for place in ranges if place in colours}
    free = (number for number in range(len(colours) + len(ranges)) if number not in kept.values())
    return {place: kept[place] if place in kept else next(free) for place in ranges}


class Replies:
    """Answers by their tickets, bounded in number and bytes except for the newest."""

    def __init__(self, limit: int = KEPT_REPLIES, bytes_limit: int = KEPT_BYTES):
        self.limit, self.bytes_limit = limit, bytes_limit
        self._kept: OrderedDict[int, Shown] = OrderedDict()
        self._lock = threading.RLock()  # garbage collection may drop tickets in any thread

    def keep(self, shown: Shown) -> Ticket:
        ticket = Ticket()
        with self._lock:
            weakref.finalize(ticket, self._drop, id(ticket))
            self._kept[id(ticket)] = shown
            self._forget_first(ticket)
            while len(self._kept) > 1 and (len(self._kept) > self.limit or self.size() > self.bytes_limit):
                self._kept.popitem(last=False)
        return ticket

    def _forget_first(self, ticket: Ticket) -> None:
        """Cut the answers before this one after UNDO_STEPS, so that one user does not take the place of others."""
        for _ in range(UNDO_STEPS):
            last = self.find(ticket)
            if last is None or last.before is None:
                return
            ticket = last.before
        last = self.find(ticket)
        if last is not None:
            self._kept[id(ticket)] = replace(last, before=None)

    def get(self, ticket: Ticket | None) -> Shown:
        """Return the answer. Raises DataError before the first question, or after it was dropped for others."""
        if ticket is None:
            raise DataError("Ask a question first: this page has no answer, or its answer is older than an hour.")
        with self._lock:
            if id(ticket) not in self._kept:
                raise DataError("This answer was removed because many people are using the app: ask again.")
            self._kept.move_to_end(id(ticket))
            return self._kept[id(ticket)]

    def find(self, ticket: Ticket | None) -> Shown | None:
        """Return the answer, or None if it was dropped."""
        return None if ticket is None else self._kept.get(id(ticket))

    def __len__(self) -> int:
        return len(self._kept)

    def size(self) -> int:
        """Return the bytes of all answers."""
        return size_of(*(shown.reply for shown in list(self._kept.values())))

    def _drop(self, key: int) -> None:
        with self._lock:
            self._kept.pop(key, None)


def size_of(*replies: Reply) -> int:
    """
    Return the bytes of the images, masks and tensors of replies, with those of the encoded images and answers; what
    several of them share counts once.
    """
    sizes: dict[int, int] = {}
    for reply in replies:
        parts: list[Any] = [*reply.outputs.values(), *reply.given_masks.values(), reply.hidden_states]
        parts += [prompt.mask for prompt in reply.prompts.values()]
        encoded = reply.encoded
        parts += [encoded.sam_embedding, encoded.sam_pixels, *tensors_in(encoded.vlm_features)]
        sizes |= {id(part): part.nbytes for part in parts if hasattr(part, "nbytes")}
        sizes[id(reply.image)] = reply.image.width * reply.image.height * 3
    return sum(sizes.values())


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a tensor, or in mappings and sequences of them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)
