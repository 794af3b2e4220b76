"""What the demonstration takes from a request: files that were uploaded to it, read within bounds of time and memory.

    POST /upload ──BoundedRequests──> folder ──own_file──> a regular file of that folder ──read_upload──> RGB image

A request may name any path. Of those outside the folder it learns nothing, not even whether there is a file. The name
of an upload has a keyed hash in it, which only the page that uploaded the file was told.
"""

import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.responses import PlainTextResponse

from images_plum import open_image
from plum_partonomy.inference.inputs import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from plum_partonomy.masks import DataError

READ_SECONDS = 20
"""Longest time that an image may take to be decoded."""
UPLOADED_BYTES = 10**9
"""Largest size of all uploads together; the oldest go first."""
LARGEST_REQUEST = 2 * MAX_IMAGE_BYTES
KEPT_DRAWINGS = 16
READER = Path(__file__).with_name("read_upload.py")


def own_file(path: str | None, folder: Path) -> Path:
    """The regular file of the folder that a request names; else DataError, the same for all other paths."""
    refused = DataError("Expected an image that was uploaded here, found none: upload it again.")
    try:
        found = Path(path or "")
        inside = found.resolve(strict=True).is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # ends of links, null characters, links in a circle
        raise refused from error
    if not inside or not found.is_file():
        raise refused
    return found


def read_upload(path: Path, *, seconds: float = READ_SECONDS) -> Image.Image:
    """An uploaded image as RGB, upright, read by a process of its own that ends after some seconds; else DataError."""
    command = [sys.executable, str(READER), str(path), str(MAX_IMAGE_PIXELS), str(MAX_IMAGE_BYTES)]
    try:
        run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"The image takes more than {seconds} seconds to read: save it in another format.") from error
    size, _, pixels = run.stdout.partition(b"\n")
    if run.returncode:
        raise DataError(run.stderr.decode(errors="replace").strip() or "The image cannot be read: save it again.")
    return Image.frombytes("RGB", tuple(map(int, size.split())), pixels)


class Drawings:
    """
    What was painted on a canvas of (width, height) `size`. Gradio's editor sends it ahead of the request that uses it,
    and keeps whatever anybody sends; here the oldest drawings go first.
    """

    def __init__(self, folder: Path, size: tuple[int, int], *, limit: int = KEPT_DRAWINGS):
        self.folder, self.size, self.limit = folder, size, limit
        self._layers: OrderedDict[str, tuple[int, bytes]] = OrderedDict()  # the last layer of each, and its number

    def accept(self, data: Any) -> None:
        """In the place of `accept_blobs` of gradio's editor: takes `data.files`, one layer or the whole picture."""
        name, number = str(data.data.get("id")), str(data.data.get("index"))
        if data.data.get("type") == "layer" and re.fullmatch("[0-9]", number):
            self._layers[name] = max(self._layers.get(name, (0, b"")), (int(number), data.files[0][1]))
            while len(self._layers) > self.limit:
                self._layers.popitem(last=False)

    def read(self, data: Any) -> Image.Image | None:
        """
        The last layer of a drawing as an image with alpha, None if nothing was painted.

        Args:
            data: The drawing as gradio's editor names it: by an `id`, or by `layers` that are uploaded files.

        Raises:
            DataError: It is no image of the canvas's size.
        """
        source: bytes | Path | None = None
        if data is not None and data.id is not None:
            _, source = self._layers.pop(data.id, (0, None))
        elif data is not None and data.layers:
            source = own_file(data.layers[-1].path, self.folder)
        if source is None:
            return None
        width, height = self.size
        layer = open_image(source, where="The drawing", max_pixels=width * height, max_bytes=MAX_IMAGE_BYTES)
        if layer.size != self.size:
            raise DataError(f"Expected a drawing of {width} x {height} pixels, found {layer.size}: paint it again.")
        return layer.convert("RGBA")


class BoundedRequests:
    """
    Refuses requests larger than LARGEST_REQUEST before they are read, and deletes the oldest uploads beyond
    UPLOADED_BYTES before a further one comes in (ASGI).
    """

    def __init__(self, app: Any, folder: Path, limit: int = UPLOADED_BYTES):
        self.app, self.folder, self.limit = app, folder, limit

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] in ("POST", "PUT", "PATCH"):
            length = dict(scope["headers"]).get(b"content-length", b"")
            if not length.isdigit() or int(length[:20]) > LARGEST_REQUEST:
                response = PlainTextResponse(f"At most {LARGEST_REQUEST} bytes, whose number is said.", 413)
                return await response(scope, receive, send)
            if scope["path"].rstrip("/").endswith("/upload"):
                self.make_room()
        await self.app(scope, receive, send)

    def make_room(self) -> None:
        # files of the folder itself are the examples
        files = [(path.stat(), path) for path in self.folder.glob("*/*") if path.is_file()]
        total = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size
