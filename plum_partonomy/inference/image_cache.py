"""Encode an image once for all its questions, with any model."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from plum_partonomy.scoring.benchmark import Asked


class ImageCache:
    """
    Features of recent images, so that an image is encoded once for all its questions and, if memory allows, for its
    use as a wrong image.

    Args:
        encode: Returns the features of an RGB image.
        size: Number of images to keep.
    """

    def __init__(self, encode: Callable[[Image.Image], Any], *, size: int):
        self.encode, self.size = encode, size
        self._features: OrderedDict[str, Any] = OrderedDict()
        self.uses, self.encoded = 0, 0

    def look_up(self, asked: Sequence[Asked]) -> dict[str, Any]:
        """
        Return the features of the questions' images by image id. Missing ones are computed one image at a time, so
        that results do not depend on the images that a resumed run has cached.
        """
        wanted = {each.image_id: each.image for each in asked}
        absent = {name: image for name, image in wanted.items() if name not in self._features}
        self._features |= {name: self.encode(image) for name, image in absent.items()}
        self.uses += len(asked)
        self.encoded += len(absent)
        for name in wanted:
            self._features.move_to_end(name)
        found = {name: self._features[name] for name in wanted}
        while len(self._features) > self.size:
            self._features.popitem(last=False)
        return found

    def summary(self) -> dict[str, Any]:
        """Return the number of requests, the number of encoded images and the hit rate."""
        hit_rate = 1 - self.encoded / self.uses if self.uses else None
        return {"size": self.size, "uses": self.uses, "encoded": self.encoded, "hit_rate": hit_rate}
