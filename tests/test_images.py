"""Image files of every kind on their way to the model: read as people see them, or refused by name."""

import base64
import io
import struct
import threading
import zipfile
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from inputs_plum import FORMATS, read_image
from plum_partonomy.features import GROUNDED_CONVERSATION_FEATURES
from plum_partonomy.images import read_image as read_stored_image
from plum_partonomy.masks import DataError, encode
from plum_partonomy.sources.untrusted import ImageFiles
from plum_partonomy.training.examples import ConversationDataset

HEIGHT, WIDTH = 4, 6
RAMP = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) * 10
GREY = Image.fromarray(RAMP)


def palette_with_a_hole() -> Image.Image:
    """Left half red; right half the palette's first colour, black, which is transparent."""
    image = Image.new("P", (WIDTH, HEIGHT))
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(1, (0, 0, WIDTH // 2, HEIGHT))
    image.info["transparency"] = 0
    return image


def half_transparent() -> Image.Image:
    image = Image.new("RGBA", (WIDTH, HEIGHT), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (WIDTH // 2, 0, WIDTH, HEIGHT))
    return image


RED_AND_WHITE = np.full((HEIGHT, WIDTH, 3), 255, dtype=np.uint8)
RED_AND_WHITE[:, : WIDTH // 2] = (255, 0, 0)
GREY_RGB = np.repeat(RAMP[..., None], 3, axis=2)
KINDS = {
    "16-bit.png": (Image.fromarray(RAMP.astype(np.uint16) * 257), GREY_RGB),
    "16-bit.tif": (Image.fromarray(RAMP.astype(np.uint16) * 257), GREY_RGB),
    "grey.png": (GREY, GREY_RGB),
    "grey-alpha.png": (Image.merge("LA", (GREY, Image.new("L", GREY.size, 255))), GREY_RGB),
    "bilevel.png": (Image.fromarray(RAMP > 100), np.repeat((RAMP > 100)[..., None] * np.uint8(255), 3, axis=2)),
    "palette.gif": (GREY.convert("RGB").quantize(64), GREY_RGB),
    "palette.png": (palette_with_a_hole(), RED_AND_WHITE),
    "alpha.png": (half_transparent(), RED_AND_WHITE),
    "alpha.webp": (half_transparent(), RED_AND_WHITE),
    "cmyk.tif": (GREY.convert("RGB").convert("CMYK"), GREY_RGB),
    "cmyk.jpg": (GREY.convert("RGB").convert("CMYK"), GREY_RGB),
}


def as_read(path) -> np.ndarray:
    """The pixels, which are the same in each form that a file can be given in, of the size that sources read."""
    size, content = ImageFiles(path.parent).size(path.name, where="record 0"), path.read_bytes()
    text = base64.b64encode(content).decode()
    stored = ({"path": str(path), "bytes": None}, {"path": path.name, "bytes": content})
    decoded = datasets.Image().decode_example(stored[0])
    with Image.open(path) as opened:
        forms = [path, str(path), content, io.BytesIO(content), text, f"data:image/png;base64,{text}", opened, decoded]
        pixels = [np.asarray(read_image(form)) for form in (*forms, *stored)]
    assert pixels[0].shape == (*size, 3)
    for other in pixels[1:]:
        np.testing.assert_array_equal(other, pixels[0])
    return pixels[0]


@pytest.mark.parametrize("name", KINDS)
def test_an_image_of_any_mode_becomes_the_rgb_that_people_see(tmp_path, name):
    image, expected = KINDS[name]
    options = {"lossless": True} if name.endswith("webp") else {"quality": 100} if name.endswith("jpg") else {}
    image.save(tmp_path / name, **options)
    np.testing.assert_allclose(as_read(tmp_path / name).astype(int), expected, atol=3 if options.get("quality") else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright_by_its_exif_orientation(tmp_path, orientation):
    stored = {1: RAMP, 2: RAMP[:, ::-1], 3: RAMP[::-1, ::-1], 4: RAMP[::-1], 5: RAMP.T, 6: np.rot90(RAMP),
              7: RAMP[::-1, ::-1].T, 8: np.rot90(RAMP, -1)}[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "image.png", exif=exif)
    np.testing.assert_array_equal(as_read(tmp_path / "image.png"), GREY_RGB)


COLOURS = np.dstack([RAMP, RAMP[::-1], 255 - RAMP])


@pytest.mark.parametrize(
    "given",
    [
        COLOURS,
        COLOURS.transpose(2, 0, 1),
        COLOURS.astype(np.int64),
        COLOURS.astype(np.uint16) * 257,
        COLOURS / 255,
        COLOURS.astype(np.float32),
        np.dstack([COLOURS, np.full_like(RAMP, 255)]),
        torch.from_numpy(COLOURS),
        torch.from_numpy(COLOURS).permute(2, 0, 1),
        torch.from_numpy(COLOURS).permute(2, 0, 1) / 255,
        Image.fromarray(COLOURS),
    ],
)
def test_an_array_or_a_tensor_is_the_image_of_its_numbers(given):
    np.testing.assert_array_equal(np.asarray(read_image(given)), COLOURS)


@pytest.mark.parametrize("given", [RAMP, RAMP[..., None], RAMP[None], torch.from_numpy(RAMP)[None], RAMP / 255.0])
def test_an_array_of_one_channel_is_grey(given):
    np.testing.assert_array_equal(np.asarray(read_image(given)), GREY_RGB)


def test_a_transparent_array_lies_on_white():
    alpha = np.repeat((np.arange(WIDTH) < WIDTH // 2)[None] * np.uint8(255), HEIGHT, axis=0)
    red = np.dstack([np.full_like(alpha, 255), np.zeros_like(alpha), np.zeros_like(alpha), alpha])
    np.testing.assert_array_equal(np.asarray(read_image(red)), RED_AND_WHITE)


def closed_file() -> io.BytesIO:
    file = io.BytesIO()
    file.close()
    return file


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.full((4, 6, 3), np.nan), "found nan to nan"),
        (COLOURS / 127.5 - 1.5, "an image that was normalised"),
        (COLOURS.astype(int) * 2, "pixels of 0 to 255"),
        (np.zeros((5, 6, 2)), r"found \(5, 6, 2\)"),
        (np.zeros((1, 4, 6, 3)), r"found \(1, 4, 6, 3\)"),
        (np.zeros((0, 6)), r"found \(0, 6\)"),
        (np.full((4, 6), "a"), "array of numbers"),
        (3, "found int"),
        ("none.png", "there is no image file 'none.png'"),
        ("a\0b", "there is no image file"),
        (base64.b64encode(bytes(600)).decode(), "base64 text of one of JPEG, .* found 'AAAA.*File name too long"),
        (closed_file(), "the image cannot be read .*closed file"),
        ("data:image/png;base64,AAAA", "not a readable image"),
        ("/dev/zero", "'/dev/zero' is not a regular file; give the path of an image file"),
        ("/dev", "'/dev' is a folder; give the path of an image file"),
        (" ", "found an empty text; give the path or URL of an image"),
        ("file:///dev/zero", "expected a path or a URL with http or https, found 'file:///dev/zero'"),
        ("HTTP://127.0.0.1:9/a.png", "cannot be fetched"),
        ("http://127.0.0.1:9/a.png", "cannot be fetched"),
        (Image.new("RGB", (257 * 4, 4)), "1028 x 4 pixels, and one side may be at most 256 times the other"),
        (Image.new("1", (8001, 8000)), "more than 64 megapixels"),
    ],
)
def test_what_is_no_image_is_refused_naming_what_was_found(given, message):
    with pytest.raises(DataError, match=f"photo: .*({message})"):
        read_image(given, where="photo")


def test_an_image_is_fetched_from_its_url(tmp_path):
    GREY.save(tmp_path / "grey.png")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        image = read_image(f"http://127.0.0.1:{server.server_port}/grey.png")
        with pytest.raises(DataError, match="more than 1e-05 MB"):
            read_image(f"http://127.0.0.1:{server.server_port}/grey.png", max_bytes=10)
        server.shutdown()
    np.testing.assert_array_equal(np.asarray(image), GREY_RGB)


def test_an_image_that_datasets_streams_from_an_archive_is_read(tmp_path):
    GREY.save(tmp_path / "grey.png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "grey.png", "grey.png")
    stored = {"bytes": None, "path": f"zip://grey.png::{tmp_path / 'images.zip'}"}
    np.testing.assert_array_equal(np.asarray(read_stored_image(stored, where="record 0")), GREY_RGB)
    with pytest.raises(DataError, match="record 0: the image cannot be read from 'zip://none.png"):
        read_stored_image({"bytes": None, "path": f"zip://none.png::{tmp_path / 'images.zip'}"}, where="record 0")


@pytest.mark.parametrize("file_format", ["EPS", "PPM", "ICO", "TGA", "DDS", "AVIF"])
def test_only_named_formats_are_opened_whatever_the_name_of_the_file(tmp_path, file_format):
    path = tmp_path / "photo.png"
    Image.fromarray(COLOURS).resize((32, 32)).save(path, format=file_format)
    with Image.open(path) as opened:
        for form in (path, path.read_bytes(), opened):
            with pytest.raises(DataError, match="JPEG, PNG, WEBP, BMP, GIF, TIFF, found"):
                read_image(form)
    with pytest.raises(DataError, match="field 'image_path'.*photo.png: not a readable image"):
        ImageFiles(tmp_path).size("photo.png", where="record 0")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about tags of TIFF
@pytest.mark.parametrize("file_format", FORMATS)
def test_a_damaged_file_of_every_format_is_read_or_refused_with_the_documented_error(file_format):
    rng, content = np.random.default_rng(0), io.BytesIO()
    Image.effect_mandelbrot((50, 40), (-2, -1, 1, 1), 20).convert("RGB").save(content, file_format)
    whole, refused = np.frombuffer(content.getvalue(), dtype=np.uint8), 0
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.integers(len(whole), size=2)] = rng.integers(256, size=2)
        try:
            read_image(damaged[: rng.integers(len(whole) // 2, len(whole) + 1)].tobytes())
        except DataError:
            refused += 1
    assert refused > 0


def empty_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def broken_file(tmp_path, kind: str) -> bytes:
    path = tmp_path / "source"
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT * 8, WIDTH * 8, 3), dtype=np.uint8)
    match kind:
        case "empty":
            return b""
        case "zero width":
            return empty_png(0, HEIGHT)
        case "bomb":
            return empty_png(60_000, 60_000)
        case "float":
            Image.fromarray(RAMP.astype(np.float32)).save(path, format="TIFF")
        case "32-bit":
            Image.fromarray(RAMP.astype(np.int32)).save(path, format="TIFF")
        case "truncated":
            Image.fromarray(noise).save(path, format="JPEG")
            return path.read_bytes()[: path.stat().st_size // 2]
    return path.read_bytes()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "not a readable image"),
        ("zero width", r"not a readable image|no pixels, \[height, width\] \[4, 0\]"),
        ("bomb", "the image has more than 64 megapixels; make it smaller"),
        ("truncated", "not a readable image"),
        ("float", "32-bit pixels .*'F'.*save it with 8 or 16 bits"),
        ("32-bit", "32-bit pixels .*'I'.*save it with 8 or 16 bits"),
    ],
)
def test_an_image_that_cannot_be_shown_is_refused_naming_record_and_file(tmp_path, kind, message):
    content = broken_file(tmp_path, kind)
    (tmp_path / "image.bin").write_bytes(content)
    with pytest.raises(DataError, match=f"record 7, field 'image_path'.*image.bin.*({message})"):
        ImageFiles(tmp_path).size("image.bin", where="record 7")


@pytest.mark.parametrize("kind", ["empty", "zero width", "truncated", "float", "32-bit"])
def test_training_names_the_record_whose_embedded_image_cannot_be_shown(tmp_path, kind):
    row = {
        "id": "record-7",
        "image": {"bytes": broken_file(tmp_path, kind), "path": None},
        "image_id": "7",
        "image_label": "bird",
        "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A <p>wing</p>."}],
        "masks": [{"label": "wing", "rle": encode(np.ones((HEIGHT, WIDTH), dtype=bool))}],
        "source": "test",
        "licence": "CC0-1.0",
    }
    records = datasets.Dataset.from_list([row], features=GROUNDED_CONVERSATION_FEATURES)
    with pytest.raises(DataError, match="record record-7, field 'image'"):
        ConversationDataset(records)[0]
