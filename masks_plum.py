"""
Masks of PLUM between their forms and frames.

A *low-res mask* has 4G x 4G logits in the frame of SAM's padded square input (G: side of SAM's image embedding in
cells). Shapes: S masks, H/W pixels.
"""

from numbers import Number

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

try:
    from .rle_plum import DataError, decode_rle, polygons_to_rle
except ImportError:
    if __package__:
        raise
    from rle_plum import DataError, decode_rle, polygons_to_rle

# Logit that stands for "certain" where a caller's binary mask takes the place of a predicted one.
GIVEN_MASK_LOGIT = 10.0


def to_binary_mask(mask, size: tuple[int, int]) -> np.ndarray:
    """
    A mask in any of the usual forms as a boolean array.

    Args:
        mask: Array, tensor, PIL image or nested list `(height, width)`, with or without one axis of length 1 for its
            single channel (non-zero is inside); COCO RLE `{"size", "counts"}`; or a list of polygons
            `[x0, y0, x1, y1, ...]` in pixels, united.
        size: (height, width) of the image the mask belongs to.

    Raises:
        ValueError: The mask has another size than its image, or its RLE or its polygons are damaged. Nothing is
            allocated before that is known.
    """
    size = (int(size[0]), int(size[1]))
    if isinstance(mask, dict):
        counts = mask.get("counts")
        counts = counts.decode("latin-1") if isinstance(counts, bytes) else counts
        return decode_rle({**mask, "counts": counts}, expected_size=size)
    if isinstance(mask, (list, tuple)):
        mask = [item.tolist() if hasattr(item, "tolist") else item for item in mask]
        if not _is_dense(mask, size):
            polygons = [list(item) if isinstance(item, tuple) else item for item in mask]
            return decode_rle(polygons_to_rle(polygons, size=size, where="mask"))
    mask = _as_array(mask, size)
    if mask.shape in ((1, *size), (*size, 1)):
        mask = mask.reshape(size)
    if mask.shape != size:
        raise DataError(f"A mask is {mask.shape} (height, width) but its image is {size}; resize the mask.")
    if mask.dtype.kind not in "biuf":
        raise DataError(f"Expected a mask of booleans or numbers, found an array of {mask.dtype}.")
    if mask.dtype.kind == "f" and not np.isfinite(mask).all():
        raise DataError("Expected a mask of finite numbers, found NaN or infinity.")
    return mask != 0


def _as_array(mask, size: tuple[int, int]) -> np.ndarray:
    if isinstance(mask, torch.Tensor):
        mask = mask.detach().cpu()
        return (mask.float() if mask.is_floating_point() else mask).numpy()
    if not isinstance(mask, Image.Image):
        return np.asarray(mask)
    if mask.size != size[::-1] or len(mask.getbands()) != 1:  # known before the pixels are decoded
        raise DataError(
            f"Expected a mask picture of one channel of {size} (height, width), found mode {mask.mode!r} of "
            f"{mask.size[::-1]}; convert it with .convert('L') or resize it."
        )
    try:
        return np.asarray(mask)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"A mask picture cannot be decoded: {error}.") from error


def _is_dense(mask: list, size: tuple[int, int]) -> bool:
    """Whether a nested list is pixels, 0 and one other value, and not polygons, whose coordinates differ."""
    if len(mask) == 1 and isinstance(mask[0], (list, tuple)) and mask[0] and isinstance(mask[0][0], (list, tuple)):
        mask = mask[0]
    if len(mask) != size[0] or not all(isinstance(row, (list, tuple)) and len(row) == size[1] for row in mask):
        return False
    values = [value for row in mask for value in row]
    return all(isinstance(value, (Number, np.bool_)) for value in values) and len({0, *values}) <= 2


def upscale_masks(
    low_res_masks: torch.Tensor, sam_image_size: int, reshaped_size: tuple[int, int], original_size: tuple[int, int]
) -> torch.Tensor:
    """
    Mask logits from SAM's low-res frame to the original image: upscale to the padded square, crop the padding, resize.

    Args:
        low_res_masks: `(S, 4G, 4G)` logits of one image.
        sam_image_size: Side of SAM's padded square input in pixels.
        reshaped_size: (height, width) of the resized image inside that square.
        original_size: (height, width) of the image as given.

    Returns:
        `(S, height, width)` logits.
    """
    masks = F.interpolate(low_res_masks[:, None], (sam_image_size,) * 2, mode="bilinear", align_corners=False)
    masks = masks[..., : reshaped_size[0], : reshaped_size[1]]
    if tuple(original_size) != tuple(reshaped_size):
        masks = F.interpolate(masks, tuple(original_size), mode="bilinear", align_corners=False)
    return masks[:, 0]


def label_frame(original_size: tuple[int, int], reshaped_size: tuple[int, int]) -> tuple[int, int]:
    """
    (height, width) at which mask labels are compared with predictions: the size of the image, or its size in SAM's
    input if the image is larger. A photograph of 12 megapixels would cost 300 MB a span, and SAM sees no more of it.

    >>> label_frame((48, 64), (768, 1024)), label_frame((3000, 4000), (768, 1024))
    ((48, 64), (768, 1024))
    """
    return tuple(reshaped_size if max(original_size) > max(reshaped_size) else original_size)


def shrink_mask(mask: torch.Tensor, size: tuple[int, int]) -> torch.BoolTensor:
    """
    A mask `(H, W)` at a smaller size: a pixel is inside if half of its area is, or, in a mask too thin for that, as
    much of its area as of any other pixel.
    """
    share = F.interpolate(mask[None, None].float(), tuple(size), mode="area")[0, 0]
    return (share > 0) & (share >= share.max().clamp(max=0.5))


def downscale_masks(
    masks: torch.Tensor, sam_image_size: int, reshaped_size: tuple[int, int], low_res_size: int
) -> torch.Tensor:
    """
    Binary masks of an original image as low-res logits, the inverse of [`upscale_masks`].

    Args:
        masks: `(S, height, width)` bool or 0/1.
        sam_image_size, reshaped_size: As in [`upscale_masks`].
        low_res_size: Side 4G of the result.

    Returns:
        `(S, 4G, 4G)` logits between -10 and 10.
    """
    masks = F.interpolate(masks[:, None].float(), tuple(reshaped_size), mode="bilinear", antialias=True)
    masks = F.pad(masks, (0, sam_image_size - reshaped_size[1], 0, sam_image_size - reshaped_size[0]))
    masks = F.interpolate(masks, (low_res_size,) * 2, mode="area")[:, 0]
    return (2 * masks - 1) * GIVEN_MASK_LOGIT
