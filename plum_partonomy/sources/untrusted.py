"""Read untrusted records: typed fields, masks, and images that must be inside their folder."""

import posixpath
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
from PIL import ExifTags

from plum_partonomy.images import check_shape, open_image
from plum_partonomy.masks import RLE, DataError, Size, polygons_to_rle, union, validate_rle
from plum_partonomy.records import PartMask, check_plain
from plum_partonomy.sources.json_files import check_size

MAX_TEXT_BYTES = 16 * 1024**2
"""Maximum size in bytes of a text file that is read at once."""

_ROTATED_ORIENTATIONS = (5, 6, 7, 8)

OnError = Callable[[DataError], None]
"""Handler of a bad record: `refuse` raises the error; any other handler collects it and the record is skipped."""


def refuse(error: DataError) -> None:
    """Raise the error of a bad record, which rejects the whole file."""
    raise error


def read_text(path: Path, *, encodings: Sequence[str] = ("utf-8-sig",)) -> str:
    """Return the content of a small file in the first encoding that fits.

    Raises DataError if it is missing, longer than MAX_TEXT_BYTES, or no encoding fits.
    """
    check_size(path, limit=MAX_TEXT_BYTES)
    content = path.read_bytes()
    for encoding in encodings:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise DataError(f"{path}: expected text in {' or '.join(encodings)}")


def find_existing(folder: Path, names: Sequence[str], *, what: str) -> Path:
    """Return the first of these files that exists in the folder. Raises DataError that says what is missing."""
    if (name := find_file(folder, names)) is None:
        raise DataError(f"{folder}: no such file for {what}; expected {' or '.join(names)}")
    return folder / name


def find_file(folder: Path, names: Iterable[str]) -> str | None:
    """Return the first of these relative paths that is a file, as spelled on disk. An accent may be a separate
    character there (NFD) and part of the letter in the records (NFC), or the reverse.
    """
    for name in names:
        for spelled in dict.fromkeys((name, normalize("NFC", name), normalize("NFD", name))):
            try:
                if (folder / spelled).is_file():
                    return spelled
            except (OSError, ValueError):  # too long, or with invalid characters
                break
    return None


def check_labels(labels: Iterable[str], *, where: str) -> None:
    """Raise DataError if a label is empty or contains a special token, or two differ only in case or spaces."""
    seen: dict[str, str] = {}
    for label in labels:
        check_unicode(label, where=where)
        check_plain(label, where=f"{where}, label {label!r:.80}")
        folded = " ".join(label.casefold().split())
        if not folded:
            raise DataError(f"{where}: a label is empty")
        if seen.setdefault(folded, label) != label:
            raise DataError(
                f"{where}: the labels {seen[folded]!r} and {label!r} differ only in case or spaces; write them alike"
            )


def typed(record: Any, field: str, kind: type | tuple[type, ...], *, where: str) -> Any:
    """Return `record[field]` after a check of its type. Raises DataError."""
    if not isinstance(record, dict) or field not in record:
        raise DataError(f"{where}: field {field!r} is missing")
    value = record[field]
    if not isinstance(value, kind):
        expected = " or ".join(item.__name__ for item in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{where}, field {field!r}: expected {expected}, found {value!r:.80}")
    if isinstance(value, str):
        check_unicode(value, where=f"{where}, field {field!r}")
    return value


def check_unicode(text: str, *, where: str) -> None:
    """Raise DataError if a text contains half a character (a lone surrogate), which no file can store."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: expected text, found half a character in {text!r:.80}; write it again") from error


def known_id(record: Any, field: str, known: Container[int], *, where: str) -> int:
    """Return the id in `record[field]` after a check that it is known. Raises DataError."""
    id = typed(record, field, int, where=where)
    if id not in known:
        raise DataError(f"{where}, field {field!r}: no usable record has the id {id}")
    return id


def typed_list(record: Any, field: str, kind: type, *, where: str) -> list[Any]:
    """Return `record[field]` after a check that it is a list of the type. Raises DataError."""
    values = typed(record, field, list, where=where)
    for position, value in enumerate(values):
        if not isinstance(value, kind):
            raise DataError(f"{where}, field '{field}[{position}]': expected {kind.__name__}, found {value!r:.80}")
        if kind is str:
            check_unicode(value, where=f"{where}, field '{field}[{position}]'")
    return values


class ImageFiles:
    """The images of a folder, each decoded once to get its size; `field` is their field name in records."""

    def __init__(self, folder: Path, *, field: str = "image_path"):
        self.folder, self.field = folder.resolve(), field
        self._sizes: dict[str, Size] = {}
        self._turned: set[str] = set()

    def spell(self, image_path: str) -> str:
        """Return the normalised path as spelled on disk, one per image; the given path if it is not a file."""
        found = find_file(self.folder, [image_path])
        path = (self.folder / (found or "")).resolve()
        inside = found is not None and path.is_relative_to(self.folder)
        return path.relative_to(self.folder).as_posix() if inside else posixpath.normpath(image_path)

    def locate(self, image_path: str, *, where: str) -> Path:
        """Return the file of a path relative to the folder. Raises DataError if it is outside the folder or does not
        exist.
        """
        place = f"{where}, field {self.field!r}"
        check_unicode(image_path, where=place)
        found = find_file(self.folder, [image_path])
        try:
            path = (self.folder / (found or image_path)).resolve()
        except (OSError, ValueError):  # invalid file name
            path = self.folder
        if Path(image_path).is_absolute() or not path.is_relative_to(self.folder):
            raise DataError(f"{place}: {image_path!r:.200} is outside {self.folder}; move the image into this folder")
        if found is None:
            raise DataError(f"{place}: there is no image {image_path!r:.200} in {self.folder}")
        return path

    def size(self, image_path: str, *, where: str) -> Size:
        """Return (height, width) in pixels after EXIF rotation. Raises DataError."""
        if image_path not in self._sizes:
            path = self.locate(image_path, where=where)
            place = f"{where}, field {self.field!r}: {path}"
            image = open_image(path, where=place)
            check_shape(image.size, where=place)
            turned = image.getexif().get(ExifTags.Base.Orientation) in _ROTATED_ORIENTATIONS
            self._sizes[image_path] = image.size if turned else image.size[::-1]
            if turned:
                self._turned.add(image_path)
        return self._sizes[image_path]

    def label_map(self, image_path: str, *, where: str) -> np.ndarray:
        """Return the pixel values of an indexed or grey image: uint8 (height, width). Raises DataError."""
        path = self.locate(image_path, where=where)
        image = open_image(path, where=f"{where}, field {self.field!r}: {path}")
        if image.mode not in ("L", "P"):
            raise DataError(
                f"{where}: expected a label map of 8 bits a pixel, found {image_path!r} in Pillow's mode "
                f"{image.mode!r}"
            )
        return np.asarray(image)

    def check_frame(self, image_path: str, annotated: Any, *, where: str) -> None:
        """Raise DataError if an annotated size [height, width] differs from the size of the upright image."""
        size = self.size(image_path, where=where)
        if tuple(annotated) == size:
            return
        self.check_turn(image_path, annotated, where=where)
        raise DataError(
            f"{where}: the mask has size {list(annotated)}, but its image {image_path!r} has [height, width] "
            f"{list(size)}"
        )

    def check_turn(self, image_path: str, annotated: Any, *, where: str) -> None:
        """Raise DataError if an annotated size [height, width] is that of the image before its EXIF rotation."""
        size = self.size(image_path, where=where)
        if image_path in self._turned and tuple(annotated) == size[::-1]:
            raise DataError(
                f"{where}: {image_path!r} is turned by its EXIF orientation to [height, width] {list(size)}, but its "
                f"masks are drawn on the unturned image {list(annotated)}; remove the orientation from all images of "
                "the folder, because half a turn does not show in the size"
            )


def read_part_masks(
    segmentations: dict[str, Any], *, resize: Callable[[RLE], RLE] | None = None, where: str
) -> list[PartMask]:
    """Return one mask per part, all of one size and sorted by label.

    `ImageFiles.check_frame` checks whether the size is that of the image.

    Args:
        segmentations: Part name -> list of segmentations, which are merged. Each is an RLE, an RLE under the key
            `segmentation`, or a flat `polygon` [x0, y0, ...] with a `size`.
        resize: Converts each of them to one size.

    Raises:
        DataError: A segmentation is malformed, or sizes differ.
    """
    check_labels(segmentations, where=f"{where}, field 'segmentations'")
    masks, size = [], None
    for label in sorted(segmentations):
        place = f"{where}, field 'segmentations[{label!r}]'"
        pieces = segmentations[label]
        if not isinstance(pieces, list) or not pieces:
            raise DataError(f"{place}: expected a list of masks, found {pieces!r:.80}")
        rles = [_read_mask(piece, where=place) for piece in pieces]
        if resize is not None:
            rles = [resize(rle) for rle in rles]
        size = size or rles[0]["size"]
        if other := next((rle["size"] for rle in rles if rle["size"] != size), None):
            raise DataError(f"{place}: the mask has size {other}, but an earlier one of the record has {size}")
        masks.append(PartMask(label, union(rles)))
    return masks


def _read_mask(piece: Any, *, where: str) -> RLE:
    if isinstance(piece, dict) and "segmentation" in piece:
        piece = piece["segmentation"]
    if isinstance(piece, dict) and "polygon" in piece:
        size = typed_list(piece, "size", int, where=where)
        return read_polygons([piece["polygon"]], size=size, where=where)
    return validate_rle(piece, where=where)


def read_segmentation(segmentation: Any, *, size: Size, where: str) -> RLE:
    """Return the mask of a COCO `segmentation` of size (height, width): polygons, an RLE of either kind, or a list of
    RLEs.

    Raises DataError.
    """
    if isinstance(segmentation, list) and segmentation and all(isinstance(item, dict) for item in segmentation):
        return union([validate_rle(item, expected_size=size, where=where) for item in segmentation])
    if isinstance(segmentation, list):
        return read_polygons(segmentation, size=size, where=where)
    return validate_rle(segmentation, expected_size=size, where=where)


def read_polygons(polygons: list[list[float]], *, size: Size, where: str) -> RLE:
    """Return the mask of size (height, width) of flat polygons of one part. Areas beyond the border are cut off.

    Raises DataError if a polygon is malformed or completely outside the image.
    """
    rle = polygons_to_rle(polygons, size=size, where=where)
    height, width = size
    for polygon in polygons:
        columns, rows = polygon[::2], polygon[1::2]
        if max(columns) < 0 or min(columns) > width or max(rows) < 0 or min(rows) > height:
            raise DataError(f"{where}: a polygon is outside the image of size {list(size)}: {polygon!r:.80}")
    return rle
