"""Image files of every kind on their way to the model: read as people see them, or refused by name."""

import struct
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image

from partkit.images import to_rgb
from partkit.masks import DataError, encode
from partkit.schema import GROUNDED_CONVERSATION_FEATURES
from partkit.sources.files import ImageFiles
from plumkit.data import ConversationDataset

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
    """Size from the source's reader, pixels from `datasets`, colours from `to_rgb`, as in training and evaluation."""
    size = ImageFiles(path.parent).size(path.name, where="record 0")
    decoded = datasets.Image().decode_example({"path": str(path), "bytes": None})
    pixels = np.asarray(to_rgb(decoded, where="record 0"))
    assert pixels.shape == (*size, 3)
    return pixels


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


def zero_width_png() -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 0, HEIGHT, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def broken_file(tmp_path, kind: str) -> bytes:
    path = tmp_path / "source"
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT * 8, WIDTH * 8, 3), dtype=np.uint8)
    match kind:
        case "empty":
            return b""
        case "zero width":
            return zero_width_png()
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
        ("empty", "no readable image"),
        ("zero width", r"no readable image|no pixels, \[height, width\] \[4, 0\]"),
        ("truncated", "no readable image"),
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
