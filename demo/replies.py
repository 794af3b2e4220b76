"""Bounded storage of the last answers of all users; the least recently used are dropped first."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from plum_partonomy.inference.one_image import Range, Reply
from plum_partonomy.masks import DataError

KEPT_REPLIES = 64
KEPT_BYTES = 10**9


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
        corrected: Characters of the span whose mask was painted last.
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
            while len(self._kept) > 1 and (len(self._kept) > self.limit or self.size() > self.bytes_limit):
                self._kept.popitem(last=False)
        return ticket

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
        return sum(size_of(shown.reply) for shown in list(self._kept.values()))

    def _drop(self, key: int) -> None:
        with self._lock:
            self._kept.pop(key, None)


def size_of(reply: Reply) -> int:
    """Return the bytes of a reply's image, given masks and tensors."""
    tensors = (value for value in reply.outputs.values() if isinstance(value, torch.Tensor))
    size = reply.image.width * reply.image.height * 3 + sum(mask.nbytes for mask in reply.given_masks.values())
    return size + sum(tensor.numel() * tensor.element_size() for tensor in tensors)
