"""Masks drawn on images, and texts cut at their spans, in one set of colours."""

import base64
import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageFilter

from plum_partonomy.images import to_rgb
from plum_partonomy.masks import RLE, decode
from plum_partonomy.scoring.predictions import SpanMask

__all__ = ["COLOURS", "data_address", "highlight", "mask_opacity", "overlay", "panel"]

# Told apart on photographs and by colour-blind readers (after Okabe and Ito), all dark enough for white text.
COLOURS = (
    "#0072b2",
    "#c44e00",
    "#00815e",
    "#b8378a",
    "#6a51a3",
    "#8c6d00",
    "#b2182b",
    "#3f6f8c",
    "#4d7c0f",
    "#7b4b2a",
)
PANEL_SIZE = 288  # longest side of an image on the page, in pixels


def overlay(image: Image.Image, masks: Sequence[np.ndarray], *, colours: Sequence[str] = COLOURS) -> Image.Image:
    """The image with every mask filled translucently and outlined.

    Args:
        image: PIL image of any mode; left unchanged.
        masks: bool arrays of the image's (height, width), drawn in order.
        colours: "#rrggbb" per mask, repeated from the start when there are more masks.

    Returns:
        A new RGB image of the same size.

    Raises:
        ValueError: a mask is not of the image's size.
    """
    drawn = to_rgb(image, where="image")
    for index, mask in enumerate(masks):
        if mask.shape != (image.height, image.width):
            raise ValueError(
                f"Expected masks of the image's (height, width) {(image.height, image.width)}, found {mask.shape} "
                f"for mask {index}: resize the mask to the image."
            )
        drawn.paste(colours[index % len(colours)], mask=Image.fromarray(mask_opacity(mask)))
    return drawn


def mask_opacity(mask: np.ndarray) -> np.ndarray:
    """Opacity 0..255, uint8, of a mask as it is drawn: translucent inside, opaque along its edge."""
    area = Image.fromarray(mask.astype(np.uint8) * 255)
    inside = area.filter(ImageFilter.MinFilter(3))
    edge = np.asarray(area) > np.asarray(inside)
    return np.where(edge, 255, np.where(mask, 140, 0)).astype(np.uint8)


def highlight(
    text: str, spans: Sequence[SpanMask], *, colours: Sequence[str] = COLOURS
) -> list[tuple[str, str | None]]:
    """Cuts a text at its spans: (piece, colour of its mask or None), in order; the pieces joined are the text."""
    pieces, position = [], 0
    for index in sorted(range(len(spans)), key=lambda index: spans[index].start):
        span = spans[index]
        pieces.append((text[position : span.start], None))
        pieces.append((text[span.start : span.end], colours[index % len(colours)]))
        position = span.end
    pieces.append((text[position:], None))
    return [piece for piece in pieces if piece[0]]


def panel(image: Image.Image, rles: Iterable[RLE], colours: Sequence[str]) -> str:
    """Address (data:) of the overlay at page size, for an HTML page."""
    scale = PANEL_SIZE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    masks = [Image.fromarray(decode(rle, expected_size=(image.height, image.width))) for rle in rles]
    masks = [np.asarray(mask.convert("L").resize(size, Image.Resampling.BILINEAR)) > 127 for mask in masks]
    drawn = overlay(to_rgb(image, where="image").resize(size, Image.Resampling.BICUBIC), masks, colours=colours)
    content = io.BytesIO()
    drawn.save(content, format="JPEG", quality=82)
    return data_address(content, kind="jpeg")


def data_address(content: io.BytesIO, *, kind: str) -> str:
    """Address (data:) of an image file, `kind` "jpeg" or "png", for an HTML page."""
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
