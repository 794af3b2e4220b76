"""Read uploaded files of requests with limits on time and memory.

    POST /upload ──BoundedRequests──> folder ──own_file──> a regular file of that folder ──read_upload──> RGB image

A request may name any path. It learns nothing about paths outside the folder, not even whether they exist. The name of
an upload contains a keyed hash that only the uploading page receives.
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
"""Maximum time for decoding an image."""
UPLOADED_BYTES = 10**9
"""Maximum size of all uploads; the oldest are deleted first."""
LARGEST_REQUEST = 2 * MAX_IMAGE_BYTES
READER = Path(__file__).with_name("read_upload.py")


def own_file(path: str | None, folder: Path) -> Path:
    """Return the regular file of the folder that a request names. Raises the same DataError for all other paths."""
    refused = DataError("Expected an image that was uploaded here, found none: upload it again.")
    try:
        found = Path(path or "")
        inside = found.resolve(strict=True).is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # dangling links, null characters, circular links
        raise refused from error
    if not inside or not found.is_file():
        raise refused
    return found


def read_upload(path: Path, *, seconds: float = READ_SECONDS) -> Image.Image:
    """Return an uploaded image as upright RGB, read by a separate process with a time limit. Raises DataError."""
    if not path.is_file():
        raise DataError("The image was deleted: upload it again.")
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
    Return the painted mask, bool (height, width), from the data URL of a PNG sent by the page.

    Args:
        size: Its required (width, height).

    Raises:
        DataError: It is not such an image.
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
    Rejects requests larger than LARGEST_REQUEST before reading them, and deletes the oldest uploads beyond
    UPLOADED_BYTES before accepting another one (ASGI).
    """

    def __init__(self, app: Any, folder: Path, limit: int = UPLOADED_BYTES):
        self.app, self.folder, self.limit = app, folder, limit

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] in ("POST", "PUT", "PATCH"):
            length = dict(scope["headers"]).get(b"content-length", b"")
            if not length.isdigit() or int(length[:20]) > LARGEST_REQUEST:
                response = PlainTextResponse(f"Expected at most {LARGEST_REQUEST} bytes with a stated length.", 413)
                return await response(scope, receive, send)
            if scope["path"].rstrip("/").endswith("/upload"):
                self.make_room()
        await self.app(scope, receive, send)

    def make_room(self) -> None:
        # files directly in the folder are the examples
        files = [(path.stat(), path) for path in self.folder.glob("*/*") if path.is_file()]
        total = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size
