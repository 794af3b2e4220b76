"""What the demonstration keeps of each person's last answer, within bounds: the least recently used go first."""

import threading
import weakref
from collections import OrderedDict

import torch

from plum_partonomy.inference.one_image import Reply
from plum_partonomy.masks import DataError

KEPT_REPLIES = 64
KEPT_BYTES = 10**9


class Ticket:
    """Stands for a reply in a person's session. When the session drops it, the reply goes."""

    def __deepcopy__(self, memo: dict) -> "Ticket":
        return self


class Replies:
    """Replies by their tickets, no more than so many and so many bytes, apart from the newest."""

    def __init__(self, limit: int = KEPT_REPLIES, bytes_limit: int = KEPT_BYTES):
        self.limit, self.bytes_limit = limit, bytes_limit
        self._kept: OrderedDict[int, Reply] = OrderedDict()
        self._lock = threading.RLock()  # tickets are dropped wherever garbage is collected

    def keep(self, reply: Reply) -> Ticket:
        ticket = Ticket()
        with self._lock:
            weakref.finalize(ticket, self._drop, id(ticket))
            self._kept[id(ticket)] = reply
            while len(self._kept) > 1 and (len(self._kept) > self.limit or self.size() > self.bytes_limit):
                self._kept.popitem(last=False)
        return ticket

    def get(self, ticket: Ticket | None) -> Reply:
        """The reply; DataError before the first question, or once it has made room for others."""
        if ticket is None:
            raise DataError("Ask a question first.")
        with self._lock:
            if id(ticket) not in self._kept:
                raise DataError("This answer is no longer kept, as many people are here: ask again.")
            self._kept.move_to_end(id(ticket))
            return self._kept[id(ticket)]

    def __len__(self) -> int:
        return len(self._kept)

    def size(self) -> int:
        """Bytes of all replies."""
        return sum(map(size_of, self._kept.values()))

    def _drop(self, key: int) -> None:
        with self._lock:
            self._kept.pop(key, None)


def size_of(reply: Reply) -> int:
    """Bytes of a reply's image, given masks and tensors."""
    tensors = (value for value in reply.outputs.values() if isinstance(value, torch.Tensor))
    size = reply.image.width * reply.image.height * 3 + sum(mask.nbytes for mask in reply.given_masks.values())
    return size + sum(tensor.numel() * tensor.element_size() for tensor in tensors)
