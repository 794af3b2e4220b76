"""What the demonstration takes from a request: files that were uploaded to it, read within bounds of time and memory.

    POST /upload ──BoundedRequests──> folder ──own_file──> a regular file of that folder ──read_upload──> RGB image

A request may name any path. Of those outside the folder it learns nothing, not even whether there is a file. The name
of an upload has a keyed hash in it, which only the page that uploaded the file was told.
"""

import base64
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from starlette.responses import PlainTextResponse

from inputs_plum import open_image
from plum_partonomy.inference.inputs import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from plum_partonomy.masks import DataError

READ_SECONDS = 20
"""Longest time that an image may take to be decoded."""
UPLOADED_BYTES = 10**9
"""Largest size of all uploads together; the oldest go first."""
LARGEST_REQUEST = 2 * MAX_IMAGE_BYTES
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
    if not path.is_file():
        raise DataError("The image is not here any more: upload it again.")
    command = [sys.executable, str(READER), str(path), str(MAX_IMAGE_PIXELS), str(MAX_IMAGE_BYTES)]
    try:
        run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"The image takes more than {seconds} seconds to read: save it in another format.") from error
    size, _, pixels = run.stdout.partition(b"\n")
    if run.returncode:
        raise DataError(run.stderr.decode(errors="replace").strip() or "The image cannot be read: save it again.")
    return Image.frombytes("RGB", tuple(map(int, size.split())), pixels)


def read_painted(address: Any, size: tuple[int, int]) -> np.ndarray:
    """
    What a person painted, bool (height, width), from the address (data:) of a PNG that the page sends.

    Args:
        size: (width, height) that it must have.

    Raises:
        DataError: it is no such image.
    """
    head = "data:image/png;base64,"
    if not isinstance(address, str) or not address.startswith(head):
        raise DataError("Paint on a mask first.")
    try:
        content = base64.b64decode(address[len(head) :], validate=True)
    except ValueError as error:
        raise DataError("The painted mask cannot be read: paint it again.") from error
    width, height = size
    image = open_image(content, where="The mask", max_pixels=width * height, max_bytes=MAX_IMAGE_BYTES)
    if image.size != size:
        raise DataError(f"Expected a mask of {width} x {height} pixels, found {image.size}: paint it again.")
    return np.asarray(image.convert("RGBA"))[..., 3] > 127


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
