"""
Masks of PLUM between their forms and frames.

A *low-res mask* has 4G x 4G logits in the frame of SAM's padded square input (G: side of SAM's image embedding in
cells). Shapes: S masks, H/W pixels.
"""

import numpy as np
import torch
import torch.nn.functional as F

# Logit that stands for "certain" where a caller's binary mask takes the place of a predicted one.
GIVEN_MASK_LOGIT = 10.0


def to_binary_mask(mask, size: tuple[int, int]) -> np.ndarray:
    """
    A mask in any of the usual forms as a boolean array.

    Args:
        mask: Array, tensor or PIL image `(height, width)` (non-zero is inside); COCO RLE `{"size", "counts"}`; or a
            list of polygons `[x0, y0, x1, y1, ...]` in pixels, united.
        size: (height, width) of the image the mask belongs to.

    Raises:
        ValueError: The mask has another size than its image, or its RLE is damaged.
    """
    if isinstance(mask, (dict, list)):
        mask = _decode_coco(mask, size)
    mask = np.asarray(mask)
    if mask.shape != tuple(size):
        raise ValueError(f"A mask is {mask.shape} (height, width) but its image is {tuple(size)}; resize the mask.")
    return mask != 0


def _decode_coco(mask: dict | list, size: tuple[int, int]) -> np.ndarray:
    from pycocotools import mask as coco_mask

    if isinstance(mask, dict):
        if list(mask["size"]) != list(size):
            raise ValueError(f"An RLE mask has size {list(mask['size'])} (height, width) but its image {list(size)}.")
        if isinstance(mask["counts"], list):
            if any(run < 0 for run in mask["counts"]) or sum(mask["counts"]) != size[0] * size[1]:
                raise ValueError(f"The runs of an RLE mask do not add up to {size[0]} x {size[1]} pixels.")
            mask = coco_mask.frPyObjects(mask, *size)
        try:
            return coco_mask.decode(mask)
        except ValueError as error:
            raise ValueError(f"An RLE mask does not decode to {size[0]} x {size[1]} pixels: {error}") from error
    if not mask or any(len(polygon) < 6 or len(polygon) % 2 for polygon in mask):
        raise ValueError(f"A polygon needs at least three points, [x0, y0, x1, y1, x2, y2], found {mask}.")
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(mask, *size)))


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


def downscale_mask(
    mask: torch.Tensor, sam_image_size: int, reshaped_size: tuple[int, int], low_res_size: int
) -> torch.Tensor:
    """
    A binary mask of an original image as low-res logits, the inverse of [`upscale_masks`].

    Args:
        mask: `(height, width)` bool or 0/1.
        sam_image_size, reshaped_size: As in [`upscale_masks`].
        low_res_size: Side 4G of the result.

    Returns:
        `(4G, 4G)` logits between -10 and 10.
    """
    mask = F.interpolate(mask[None, None].float(), tuple(reshaped_size), mode="bilinear", antialias=True)
    mask = F.pad(mask, (0, sam_image_size - reshaped_size[1], 0, sam_image_size - reshaped_size[0]))
    mask = F.interpolate(mask, (low_res_size,) * 2, mode="area")[0, 0]
    return (2 * mask - 1) * GIVEN_MASK_LOGIT
