"""
Segmenters behind one interface, and the frames of their masks.

A *segmenter* is a model of the SAM kind: it encodes an image once, and decodes masks from prompts. All families of
`SEGMENTERS` are used through one interface, [`SamSegmenter`]: encode images, decode one step. "No mask" and the
embeddings of masks and of cell positions are modules of the same names in every family. The *prompts* of a span are
points, a box and a present mask beside its query, embedded by the segmenter's own prompt encoder.

Shapes. S spans, n of them at a time, N images, C SAM width, E channels of an image embedding, G grid side, H/W pixels.
A *low-res mask* has 4G x 4G logits in the frame of SAM's square input, or in that of a *window*, a square x0, y0, side
in pixels of this input.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

# Logit for certainty, for binary masks given by the caller.
GIVEN_MASK_LOGIT = 10.0
# Side of the smallest window as a share of SAM's input.
SMALLEST_WINDOW = 1 / 4


def upscale_masks(
    low_res_masks: torch.Tensor,
    sam_image_size: int,
    reshaped_size: tuple[int, int],
    original_size: tuple[int, int],
    windows: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Resize mask logits from SAM's low-res frame to the original image: upscale to the padded square, crop, resize.

    Args:
        low_res_masks: `(S, 4G, 4G)` logits of one image.
        sam_image_size: Side of SAM's padded square input in pixels.
        reshaped_size: (height, width) of the resized image inside that square.
        original_size: (height, width) of the image as given.
        windows: `(S, 3)` window of each mask. Default: the whole input.

    Returns:
        `(S, height, width)` logits.
    """
    if windows is None:
        masks = F.interpolate(low_res_masks[:, None], (sam_image_size,) * 2, mode="bilinear", align_corners=False)
    else:
        masks = paste_windows(low_res_masks, windows, sam_image_size, sam_image_size)[:, None]
    masks = masks[..., : reshaped_size[0], : reshaped_size[1]]
    if tuple(original_size) != tuple(reshaped_size):
        masks = F.interpolate(masks, tuple(original_size), mode="bilinear", align_corners=False)
    return masks[:, 0]


def label_frame(original_size: tuple[int, int], reshaped_size: tuple[int, int]) -> tuple[int, int]:
    """
    Return the (height, width) at which mask labels are compared with predictions: the size of the image, or its size
    in SAM's input if the image is larger. A photograph of 12 megapixels would take 300 MB per span without added
    detail.

    >>> label_frame((48, 64), (768, 1024)), label_frame((3000, 4000), (768, 1024))
    ((48, 64), (768, 1024))
    """
    return tuple(reshaped_size if max(original_size) > max(reshaped_size) else original_size)


def shrink_mask(mask: torch.Tensor, size: tuple[int, int]) -> torch.BoolTensor:
    """Return a mask `(H, W)` at a smaller size, by [`largest_share`]."""
    return largest_share(F.interpolate(mask[None, None].float(), tuple(size), mode="area")[0])[0]


def downscale_masks(
    masks: torch.Tensor, sam_image_size: int, reshaped_size: tuple[int, int], low_res_size: int
) -> torch.Tensor:
    """
    Return binary masks of an original image as low-res logits, the inverse of [`upscale_masks`].

    Args:
        masks: `(S, height, width)` bool or 0/1.
        sam_image_size, reshaped_size: As in [`upscale_masks`].
        low_res_size: Side 4G of the result.

    Returns:
        `(S, 4G, 4G)` logits between -10 and 10.
    """
    (shares,) = mask_shares(masks, sam_image_size, reshaped_size, low_res_size)
    return share_logits(shares)


def mask_shares(
    masks: torch.Tensor, sam_image_size: int, reshaped_size: tuple[int, int], *sides: int
) -> list[torch.Tensor]:
    """
    Return binary masks of an original image in the frame of SAM's input, at several resolutions: for each side the
    share `(S, side, side)` of each cell that is inside. Other arguments as in [`downscale_masks`].
    """
    masks = F.interpolate(masks[:, None].float(), tuple(reshaped_size), mode="bilinear", antialias=True)
    masks = F.pad(masks, (0, sam_image_size - reshaped_size[1], 0, sam_image_size - reshaped_size[0]))
    return [F.interpolate(masks, (side,) * 2, mode="area")[:, 0] for side in sides]


def share_logits(shares: torch.Tensor) -> torch.Tensor:
    """Return the result of [`mask_shares`] as logits between -10 and 10."""
    return (2 * shares - 1) * GIVEN_MASK_LOGIT


def largest_share(shares: torch.Tensor) -> torch.BoolTensor:
    """
    Return the pixels of masks `(S, H, W)` with half of their area inside or, in a mask too thin for that, with the
    largest share.
    """
    return (shares > 0) & (shares >= shares.amax(dim=(1, 2), keepdim=True).clamp(max=0.5))


def windows_around(
    masks: torch.BoolTensor, prompts: "SpanPrompt", sam_image_size: int, factor: float | torch.Tensor
) -> torch.Tensor:
    """
    Return the windows `(n, 3)` around masks and prompts (zoom-in, arXiv 2001.10331): squares `factor` times as large
    as the box around all, at least `SMALLEST_WINDOW` of SAM's input. Around nothing it is the whole input.

    Args:
        masks: `(n, s, s)` in the frame of SAM's input.
        prompts: A batch of n prompts.
        sam_image_size: Side of that frame in pixels.
        factor: One for all windows, or `(n,)`.
    """
    ends = [ends_of(masks, sam_image_size / masks.shape[-1])]  # top left and bottom right corners, (n, 2) each
    if prompts.points is not None:
        ends.append((prompts.points.amin(dim=1), prompts.points.amax(dim=1) + 1))
    if prompts.box is not None:
        ends.append(prompts.box.split(2, dim=1))
    low, high = (torch.stack(corners) for corners in zip(*ends, strict=True))
    low, high = low.amin(dim=0), high.amax(dim=0)
    nothing = low > high
    low, high = low.masked_fill(nothing, 0), high.masked_fill(nothing, sam_image_size)
    side = (factor * (high - low).amax(dim=1)).clamp(SMALLEST_WINDOW * sam_image_size, sam_image_size)[:, None]
    start = ((low + high - side) / 2).clamp(min=0).minimum(sam_image_size - side)
    return torch.cat([start, side], dim=1)


def ends_of(masks: torch.BoolTensor, cell: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the top left and bottom right corners `(n, 2)` of masks `(n, s, s)` with cells of this side: x, y in pixels,
    infinity and its negative for an empty mask.
    """
    corners = []
    for axis in (1, 2):  # columns for x, rows for y
        inside = masks.any(dim=axis).int()  # (n, s)
        low, high = inside.argmax(dim=1), inside.shape[1] - inside.flip(1).argmax(dim=1)
        empty = ~inside.any(dim=1)
        corners.append(((low * cell).masked_fill(empty, torch.inf), (high * cell).masked_fill(empty, -torch.inf)))
    return tuple(torch.stack(ends, dim=1) for ends in zip(*corners, strict=True))


def crop_windows(frames: torch.Tensor, windows: torch.Tensor, sam_image_size: int, side: int) -> torch.Tensor:
    """
    Return windows `(n, 3)` of images or masks `(n, c, s, s)` in the frame of SAM's input, resized to `(n, c, side,
    side)`.
    """
    x0, y0, size = (windows / sam_image_size).unbind(dim=1)
    centres = (torch.arange(side, device=frames.device) + 0.5) / side
    return _sample(frames, x0[:, None] + centres * size[:, None], y0[:, None] + centres * size[:, None])


def paste_windows(masks: torch.Tensor, windows: torch.Tensor, sam_image_size: int, side: int) -> torch.Tensor:
    """
    Return logits `(n, s, s)` of windows `(n, 3)` in the frame of SAM's input, `(n, side, side)`: the reverse of
    [`crop_windows`], with certainty of "outside" around the windows.
    """
    x0, y0, size = (windows / sam_image_size).unbind(dim=1)
    centres = (torch.arange(side, device=masks.device) + 0.5) / side
    x, y = ((centres - start[:, None]) / size[:, None] for start in (x0, y0))  # 0 to 1 inside the window
    inside = ((y > 0) & (y < 1))[:, :, None] & ((x > 0) & (x < 1))[:, None]
    return _sample(masks[:, None], x, y)[:, 0].masked_fill(~inside, -GIVEN_MASK_LOGIT)


def _sample(frames: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return frames `(n, c, s, s)` at columns `(n, W)` and rows `(n, H)`, both shares of the side: `(n, c, H, W)`."""
    size = -1, y.shape[1], x.shape[1]
    grid = torch.stack([x[:, None].expand(size), y[:, :, None].expand(size)], dim=3)
    # In float32, because bfloat16 has too few numbers for places in an image.
    sampled = F.grid_sample(frames.float(), 2 * grid - 1, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.to(frames.dtype)


def label_in_frame(mask: torch.Tensor, original: tuple[int, int], frame: tuple[int, int]) -> torch.Tensor:
    found = tuple(mask.shape)
    if found not in (original, frame):
        raise ValueError(f"A mask label is {found} pixels but its image is {original}; resize the mask.")
    return mask if found == frame else shrink_mask(mask, frame)


@contextmanager
def weights_in_place(*modules: nn.Module):
    """Context in which offloaded weights are loaded for code that reads weights without calling their modules."""
    with ExitStack() as stack:
        for module in modules:
            if hasattr(module, "_hf_hook"):
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(module))
        yield


@dataclass(frozen=True, kw_only=True)
class SpanPrompt:
    """
    The prompts of one span beside its query, in pixels of SAM's square input; None for those absent. A batch of
    prompts of one form has a dimension n before those named here.

    Args:
        points: `(K, 2)` x, y.
        labels: `(K,)` 1 for a point inside the mask, 0 for one outside.
        box: `(4,)` x0, y0, x1, y1.
        mask: `(4G, 4G)` low-res logits of the present mask, embedded as the dense prompt.
    """

    points: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    box: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def in_windows(self, windows: torch.Tensor, sam_image_size: int, side: int) -> "SpanPrompt":
        """
        Return a batch of prompts in the frames of windows `(n, 3)`. Masks `(n, s, s)`, of any resolution, become
        low-res logits `(n, side, side)` of -10 or 10 where a cell has one value.
        """
        start, scale = windows[:, None, :2], (sam_image_size / windows[:, 2])[:, None, None]
        points = box = mask = None
        if self.points is not None:
            points = (self.points + 0.5 - start) * scale - 0.5  # a point is the centre of its pixel
        if self.box is not None:
            box = ((self.box.unflatten(1, (2, 2)) - start) * scale).flatten(1)
        if self.mask is not None:
            inside = crop_windows((self.mask > 0).float()[:, None], windows, sam_image_size, 2 * side)
            mask = share_logits(F.avg_pool2d(inside, 2)[:, 0])
        return SpanPrompt(points=points, labels=self.labels, box=box, mask=mask)

    @property
    def form(self) -> tuple[int, bool, bool]:
        """Number of points, and whether there is a box and a mask. Prompts of one form are decoded together."""
        return 0 if self.points is None else len(self.points), self.box is not None, self.mask is not None

    @classmethod
    def batch(cls, prompts: Sequence["SpanPrompt"]) -> "SpanPrompt":
        """Return prompts of one form as a batch."""

        def stack(name: str) -> torch.Tensor | None:
            values = [getattr(prompt, name) for prompt in prompts]
            return None if values[0] is None else torch.stack(values)

        return cls(**{field.name: stack(field.name) for field in fields(cls)})

    @classmethod
    def batches(cls, prompts: Mapping[int, "SpanPrompt"]) -> Iterator[tuple[list[int], "SpanPrompt"]]:
        """Yield the prompts of each form as a batch, with their keys."""
        forms: dict[tuple, list[int]] = {}
        for key, prompt in prompts.items():
            forms.setdefault(prompt.form, []).append(key)
        for keys in forms.values():
            yield keys, cls.batch([prompts[key] for key in keys])


class SamSegmenter:
    """
    SAM (arXiv 2304.02643), and the interface of all segmenters. Objects have no state: `sam` is transformers' model.

    An image is stored as one tensor `(E, G, G)`, its *embedding*. The first C channels are the grid that prompts
    attend to; families with finer features add them as further channels, folded into the grid, so that embeddings of
    any family are cached, indexed and batched alike.
    """

    def embedding_width(self, config) -> int:
        """Return E, from the config of `sam`."""
        return config.prompt_encoder_config.hidden_size

    def image_encoder(self, sam: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
        """Return by name what [`encode`] computes with."""
        return {"vision_encoder": sam.vision_encoder}

    def encode(self, sam: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return embeddings `(N, E, G, G)` of pixels `(N, 3, image_size, image_size)`."""
        return sam.vision_encoder(pixel_values).last_hidden_state

    def embed_prompts(
        self, sam: nn.Module, prompts: SpanPrompt, like: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        Return the sparse prompts `(n, P, C)` and dense prompts `(n, C, G, G)` of a batch of n prompts, each None
        without any, on the device and in the precision of `like`.
        """
        given = (getattr(prompts, field.name) for field in fields(prompts))
        # transformers' prompt encoders take several masks for each image, here one: (n, 1, ...)
        points, labels, boxes, masks = (None if each is None else each[:, None].to(like.device) for each in given)
        encoder = sam.prompt_encoder
        with weights_in_place(*[module for module in encoder.modules() if isinstance(module, nn.Embedding)]):
            sparse, dense = encoder(points, labels, boxes, None if masks is None else masks.to(like))
        return None if sparse is None else sparse[:, 0].to(like), None if masks is None else dense.to(like)

    def decode(
        self,
        sam: nn.Module,
        embeddings: torch.Tensor,
        positions: torch.Tensor,
        sparse_prompts: torch.Tensor,
        dense_prompts: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Decode one mask for each of n prompts.

        Args:
            embeddings: `(n, E, G, G)` of the prompts' images.
            positions: `(n, C, G, G)` embeddings of the cells' positions.
            sparse_prompts: `(n, P, C)` embeddings of P queries, points or corners of a box each.
            dense_prompts: `(n, C, G, G)`.

        Returns:
            Logits `(n, 4G, 4G)` and predicted IoUs `(n,)`.
        """
        return self._first_mask(sam, embeddings, positions, sparse_prompts, dense_prompts)

    @staticmethod
    def _first_mask(sam, grid, positions, sparse_prompts, dense_prompts, **features):
        """Run the mask decoder of `sam`; return the first mask and its score, and what the decoder returns beside."""
        tokens = [module for module in sam.mask_decoder.children() if isinstance(module, nn.Embedding)]
        with weights_in_place(*tokens):
            masks, iou_scores, *further = sam.mask_decoder(
                grid,
                image_positional_embeddings=positions,
                sparse_prompt_embeddings=sparse_prompts[:, None],  # one set of prompts for each mask
                dense_prompt_embeddings=dense_prompts,
                multimask_output=False,
                **features,
            )
        return masks[:, 0, 0], iou_scores[:, 0, 0], *further


class SamHQSegmenter(SamSegmenter):
    """SAM-HQ (arXiv 2306.01567): the features of the encoder's first global layer refine the mask."""

    def embedding_width(self, config) -> int:
        return config.prompt_encoder_config.hidden_size + config.vision_config.hidden_size

    def encode(self, sam, pixel_values):
        outputs = sam.vision_encoder(pixel_values)
        early = outputs.intermediate_embeddings[0].permute(0, 3, 1, 2)
        return torch.cat([outputs.last_hidden_state, early], dim=1)

    def decode(self, sam, embeddings, positions, sparse_prompts, dense_prompts):
        width = sam.config.prompt_encoder_config.hidden_size
        early = embeddings[:, width:].permute(0, 2, 3, 1)
        features = {"intermediate_embeddings": [early], "hq_token_only": False}
        return self._first_mask(sam, embeddings[:, :width], positions, sparse_prompts, dense_prompts, **features)


class Sam2Segmenter(SamSegmenter):
    """
    SAM 2.1 (arXiv 2408.00714) and SAM 3's tracker, for single images: features of two finer levels, (C / 8, 4G, 4G)
    and (C / 4, 2G, 2G), refine the mask. Its score is the predicted IoU times the probability of an object.
    """

    def embedding_width(self, config) -> int:
        # 16 finest cells of C / 8 channels and 4 finer ones of C / 4 in each cell of the grid.
        return 4 * config.prompt_encoder_config.hidden_size

    def image_encoder(self, sam):
        decoder = sam.mask_decoder
        finer = {"mask_decoder.conv_s0": decoder.conv_s0, "mask_decoder.conv_s1": decoder.conv_s1}
        return {**super().image_encoder(sam), **finer, "no_memory_embedding": sam.no_memory_embedding}

    def encode(self, sam, pixel_values):
        levels = sam.get_image_features(pixel_values, return_dict=True).fpn_hidden_states  # (cells, N, channels) each
        # SAM 3 has a fourth, coarser level, which is for its detector. transformers' Sam3TrackerModel adds the
        # embedding to that one, without effect; its video model, as the original, adds it to the grid.
        levels = list(levels[:3])
        with weights_in_place(sam):
            levels[-1] = levels[-1] + sam.no_memory_embedding
        finest, finer, grid = (level.permute(1, 2, 0).unflatten(2, (math.isqrt(len(level)),) * 2) for level in levels)
        return torch.cat([grid, F.pixel_unshuffle(finer, 2), F.pixel_unshuffle(finest, 4)], dim=1)

    def decode(self, sam, embeddings, positions, sparse_prompts, dense_prompts):
        width = sam.config.prompt_encoder_config.hidden_size
        grid, finer, finest = embeddings.split([width, width, 2 * width], dim=1)
        features = {"high_resolution_features": [F.pixel_shuffle(finest, 4), F.pixel_shuffle(finer, 2)]}
        masks, iou_scores, _, object_logits = self._first_mask(
            sam, grid, positions, sparse_prompts, dense_prompts, **features
        )
        return masks, iou_scores * object_logits[:, 0, 0].sigmoid()


SEGMENTERS = {
    "sam": SamSegmenter(),
    "sam_hq": SamHQSegmenter(),
    "sam2": Sam2Segmenter(),
    "sam3_tracker": Sam2Segmenter(),
}
