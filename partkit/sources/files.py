"""Reading untrusted files: bounded JSON, typed fields, images that stay inside their folder."""

import json
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from partkit.masks import MAX_PIXELS, RLE, DataError, Size, polygons_to_rle, union, validate_rle
from partkit.schema import PartMask

MAX_JSON_BYTES = 2 * 1024**3
"""Largest JSON file read, in bytes; it is held in memory as a whole."""

_ROTATED_ORIENTATIONS = (5, 6, 7, 8)


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises DataError if it is missing, larger than MAX_JSON_BYTES or no JSON."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; data_dir must be the folder that holds {path.name} and images/")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise DataError(f"{path}: {size} bytes exceed the limit of {MAX_JSON_BYTES}; split the file")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON ({error})") from error


def typed(record: Any, field: str, kind: type | tuple[type, ...], *, where: str) -> Any:
    """`record[field]`, checked to be of the kind. Raises DataError."""
    if not isinstance(record, dict) or field not in record:
        raise DataError(f"{where}: field {field!r} is missing")
    value = record[field]
    if not isinstance(value, kind):
        expected = " or ".join(item.__name__ for item in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{where}, field {field!r}: expected {expected}, found {value!r:.80}")
    return value


def typed_list(record: Any, field: str, kind: type, *, where: str) -> list[Any]:
    """`record[field]`, checked to be a list of the kind. Raises DataError."""
    values = typed(record, field, list, where=where)
    for position, value in enumerate(values):
        if not isinstance(value, kind):
            raise DataError(f"{where}, field '{field}[{position}]': expected {kind.__name__}, found {value!r:.80}")
    return values


class ImageFiles:
    """The images of a folder, each opened and decoded once to learn its size."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self._sizes: dict[str, Size] = {}

    def locate(self, image_path: str, *, where: str) -> Path:
        """The file of a path relative to the folder. Raises DataError if that leads out of it or to no file."""
        path = (self.folder / image_path).resolve() if "\0" not in image_path else self.folder
        if Path(image_path).is_absolute() or not path.is_relative_to(self.folder):
            raise DataError(f"{where}, field 'image_path': {image_path!r} leads out of {self.folder}")
        if not path.is_file():
            raise DataError(f"{where}, field 'image_path': there is no image {image_path!r} in {self.folder}")
        return path

    def size(self, image_path: str, *, where: str) -> Size:
        """(height, width) in pixels as `datasets.Image` decodes it, turned upright. Raises DataError."""
        if image_path not in self._sizes:
            self._sizes[image_path] = _decoded_size(self.locate(image_path, where=where), where=where)
        return self._sizes[image_path]


def _decoded_size(path: Path, *, where: str) -> Size:
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"{where}, field 'image_path': {path} has {width * height} pixels; the limit is {MAX_PIXELS}"
                )
            image.load()
            orientation = image.getexif().get(ExifTags.Base.Orientation)
    except DataError:
        raise
    except Exception as error:  # on corrupt files Pillow's decoders raise nearly anything
        raise DataError(f"{where}, field 'image_path': {path} is no readable image ({error})") from error
    return (width, height) if orientation in _ROTATED_ORIENTATIONS else (height, width)


def read_part_masks(segmentations: dict[str, Any], *, image_size: Size, where: str) -> list[PartMask]:
    """One mask per part, sorted by label, from part name -> list of segmentations, which are united.

    A segmentation is an RLE, an RLE under the key `segmentation`, or a flat `polygon` [x0, y0, ...] beside `size`.
    Raises DataError.
    """
    masks = []
    for label in sorted(segmentations):
        place = f"{where}, field 'segmentations[{label!r}]'"
        pieces = segmentations[label]
        if not isinstance(pieces, list) or not pieces:
            raise DataError(f"{place}: expected a list of masks, found {pieces!r:.80}")
        rles = [_read_mask(piece, image_size=image_size, where=place) for piece in pieces]
        masks.append(PartMask(label, union(rles)))
    return masks


def _read_mask(piece: Any, *, image_size: Size, where: str) -> RLE:
    if isinstance(piece, dict) and "segmentation" in piece:
        piece = piece["segmentation"]
    if isinstance(piece, dict) and "polygon" in piece:
        size = typed_list(piece, "size", int, where=where)
        if tuple(size) != image_size:
            raise DataError(
                f"{where}: the polygon has size {size}, but its image has [height, width] {list(image_size)}"
            )
        return polygons_to_rle([piece["polygon"]], size=image_size, where=where)
    return validate_rle(piece, expected_size=image_size, where=where)
