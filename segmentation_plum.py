"""
From the queries of spans to their masks: frames of masks, segmenters, mask feedback, prompts, decoding in lock-step.

A *segmenter* is a model of the SAM kind: it encodes an image once, and decodes masks from prompts. All families of
`SEGMENTERS` are used through one interface, [`SamSegmenter`]: encode images, decode one step. "No mask" and the
embeddings of masks and of cell positions are modules of the same names in every family. The *prompts* of a span are
points, a box and a present mask beside its query, embedded by the segmenter's own prompt encoder.

Shapes. B rows, L tokens, S spans of the whole batch, n of them at a time, N images, D language width, C SAM width,
G grid side, H/W pixels. A *low-res mask* has 4G x 4G logits in the frame of SAM's square input.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

try:
    from .configuration_plum import PlumConfig
except ImportError:
    if __package__:
        raise
    from configuration_plum import PlumConfig

# Logit for certainty, for binary masks given by the caller.
GIVEN_MASK_LOGIT = 10.0
# Inputs with the prompts of spans, in transformers' names.
PROMPTS = ("input_points", "input_labels", "input_boxes", "input_masks")
# Random numbers that determine the prompts of one span in training, and the largest number of its prompted decodes.
PROMPT_DRAWS, MAX_PROMPT_ROUNDS = 11, 5
# Probability that they come without the query of their span.
BLIND = 0.5
# Standard deviation of a box in training as a share of its sides, and the largest displacement in pixels, as in SAM.
BOX_NOISE, MAX_BOX_NOISE = 0.1, 20.0
# Mask prompts decoded at once: on a CPU limited by the total number of image cells, elsewhere a fixed number.
CPU_CELLS_AT_ONCE = 16 * 16 * 16
PROMPTS_AT_ONCE = 64


def upscale_masks(
    low_res_masks: torch.Tensor, sam_image_size: int, reshaped_size: tuple[int, int], original_size: tuple[int, int]
) -> torch.Tensor:
    """
    Resize mask logits from SAM's low-res frame to the original image: upscale to the padded square, crop, resize.

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
    Return the (height, width) at which mask labels are compared with predictions: the size of the image, or its size
    in SAM's input if the image is larger. A photograph of 12 megapixels would take 300 MB per span without added
    detail.

    >>> label_frame((48, 64), (768, 1024)), label_frame((3000, 4000), (768, 1024))
    ((48, 64), (768, 1024))
    """
    return tuple(reshaped_size if max(original_size) > max(reshaped_size) else original_size)


def shrink_mask(mask: torch.Tensor, size: tuple[int, int]) -> torch.BoolTensor:
    """
    Return a mask `(H, W)` at a smaller size. A pixel is inside if half of its area is; in a mask too thin for that,
    the pixels with the largest area are inside.
    """
    share = F.interpolate(mask[None, None].float(), tuple(size), mode="area")[0, 0]
    return (share > 0) & (share >= share.max().clamp(max=0.5))


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
    masks = F.interpolate(masks[:, None].float(), tuple(reshaped_size), mode="bilinear", antialias=True)
    masks = F.pad(masks, (0, sam_image_size - reshaped_size[1], 0, sam_image_size - reshaped_size[0]))
    masks = F.interpolate(masks, (low_res_size,) * 2, mode="area")[:, 0]
    return (2 * masks - 1) * GIVEN_MASK_LOGIT


def shrink_mask_labels(
    mask_labels: list[torch.Tensor], sizes: torch.LongTensor, sam_image_size: int, low_res_size: int
) -> torch.Tensor:
    """
    Return true masks as low-res logits `(M, 4G, 4G)`.

    Args:
        mask_labels: M masks `(H, W)`, 0/1, at the size of their image or of `label_frame`.
        sizes: `(M, 4)`, (height, width) in pixels of each mask's image as given and as resized for SAM.
    """
    shrunk = torch.empty(len(mask_labels), low_res_size, low_res_size, device=sizes.device)
    for size in sizes.unique(dim=0):
        members = (sizes == size).all(dim=1).nonzero()[:, 0]
        original, reshaped = tuple(size[:2].tolist()), tuple(size[2:].tolist())
        frame = label_frame(original, reshaped)
        masks = torch.stack([label_in_frame(mask_labels[i], original, frame) for i in members.tolist()])
        shrunk[members] = downscale_masks(masks.to(sizes.device), sam_image_size, reshaped, low_res_size)
    return shrunk


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
    The prompts of one span beside its query, in pixels of SAM's square input; None for those absent.

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

    @property
    def form(self) -> tuple[int, bool, bool]:
        """Number of points, and whether there is a box and a mask. Prompts of one form are decoded together."""
        return 0 if self.points is None else len(self.points), self.box is not None, self.mask is not None


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
        self, sam: nn.Module, prompts: Sequence[SpanPrompt], like: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        Return the sparse prompts `(n, P, C)` and dense prompts `(n, C, G, G)` of n prompts of one form, each None
        without any, on the device and in the precision of `like`.
        """

        def stack(name: str) -> torch.Tensor | None:
            values = [getattr(prompt, name) for prompt in prompts]
            return None if values[0] is None else torch.stack(values)[:, None].to(like.device)  # (n, 1, ...)

        points, labels, boxes, masks = map(stack, ("points", "labels", "box", "mask"))
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


class PlumMaskFeedback(nn.Module):
    """
    The dense prompt of a span, computed from the masks of the earlier spans of its conversation.

    Each earlier mask runs through SAM's own mask embedding (passed in, so the weights exist once), modulated by that
    span's query before each activation (FiLM, arXiv 1709.07871); then, per grid cell, a learned query attends over
    the earlier masks.
    """

    def __init__(self, config: PlumConfig):
        super().__init__()
        width = config.sam_width
        channels = config.sam_config.prompt_encoder_config.mask_input_channels
        self.num_heads = config.mask_feedback_num_heads
        self.film = nn.ModuleList([nn.Linear(width, 2 * channels // 4), nn.Linear(width, 2 * channels)])
        self.queries = nn.Parameter(torch.empty(config.sam_grid_size**2, width))
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def embed(
        self, masks: torch.Tensor, span_queries: torch.Tensor, positions: torch.Tensor, mask_embed: nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return keys and values of masks, computed once per span and used by all later ones.

        Args:
            masks: `(n, 4G, 4G)` low-res logits.
            span_queries: `(n, C)` queries of their spans.
            positions: `(1, C, G, G)` SAM's dense positional embedding.
            mask_embed: SAM's `prompt_encoder.mask_embed`.

        Returns:
            Keys and values, each `(n, G*G, C)`.
        """
        hidden_states = mask_embed.layer_norm1(mask_embed.conv1(masks[:, None]))
        hidden_states = mask_embed.activation(self._modulate(hidden_states, self.film[0](span_queries)))
        hidden_states = mask_embed.layer_norm2(mask_embed.conv2(hidden_states))
        hidden_states = mask_embed.activation(self._modulate(hidden_states, self.film[1](span_queries)))
        hidden_states = mask_embed.conv3(hidden_states) + positions  # (n, C, G, G)
        hidden_states = hidden_states.flatten(2).transpose(1, 2)  # (n, G*G, C)
        return self.k_proj(hidden_states), self.v_proj(hidden_states)

    @staticmethod
    def _modulate(hidden_states: torch.Tensor, film: torch.Tensor) -> torch.Tensor:
        scale, shift = film[..., None, None].chunk(2, dim=1)
        return hidden_states * (1 + scale) + shift

    def forward(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return dense prompts `(n, C, G, G)` from keys and values `(n, T, G*G, C)` of T earlier masks each."""
        rows, earlier, cells, width = keys.shape
        by_head = (rows, earlier, cells, self.num_heads, width // self.num_heads)
        queries = self.q_proj(self.queries).view(by_head[2:])  # (G*G, heads, C/heads)
        scores = (queries * keys.view(by_head)).sum(-1) / math.sqrt(by_head[-1])  # (n, T, G*G, heads)
        attended = (scores.softmax(dim=1)[..., None] * values.view(by_head)).sum(dim=1)
        dense = self.out_proj(attended.flatten(2))  # (n, G*G, C)
        grid = math.isqrt(cells)
        return dense.transpose(1, 2).unflatten(2, (grid, grid))


def mean_over_spans(states: torch.Tensor, spans: torch.LongTensor) -> torch.Tensor:
    """Return the means `(S, D)` of token states `(B, L, D)` over the tokens of each span `[row, start, end)`."""
    rows, starts, ends = spans.unbind(dim=1)
    position = torch.arange(states.shape[1], device=states.device)
    inside = (position >= starts[:, None]) & (position < ends[:, None])  # (S, L)
    weights = inside / (ends - starts)[:, None]
    return torch.einsum("sl,sld->sd", weights.to(states.dtype), states[rows])


class MaskTargets:
    """
    Assigns true masks to spans during decoding, and selects the masks that are fed back.

    Spans of one answer with the same words are interchangeable: they form a group with the masks of these words. Each
    span takes, in decoding order, the remaining mask of its group that its prediction overlaps most (soft dice).
    Usually a group has one span and one mask.

    Args:
        low_res_masks: `(M, 4G, 4G)` true masks as low-res logits; M is at least S.
        span_groups, mask_groups: `(S,)` and `(M,)` group of each span and of each mask.
        forced: `(S,)` bool, the spans whose true mask is fed back instead of the predicted one (teacher forcing).

    Raises:
        ValueError: A group has more spans than masks.
    """

    def __init__(
        self,
        low_res_masks: torch.Tensor,
        span_groups: torch.LongTensor,
        mask_groups: torch.LongTensor,
        forced: torch.BoolTensor,
    ):
        self.low_res_masks, self.forced = low_res_masks, forced
        self.span_groups, self.mask_groups = span_groups, mask_groups
        self.free = torch.ones_like(mask_groups, dtype=torch.bool)
        self.of_span = torch.full_like(span_groups, -1)  # (S,) index of the mask that each span took
        groups = int(torch.cat([span_groups, mask_groups]).max()) + 1
        lacking = span_groups.bincount(minlength=groups) - mask_groups.bincount(minlength=groups)
        if (lacking > 0).any():
            group = int(lacking.argmax())
            raise ValueError(f"Group {group} has {int(lacking.max())} spans more than mask_labels; give each a mask.")

    @torch.no_grad()
    def assign(self, members: torch.LongTensor, logits: torch.Tensor):
        """Assign masks to the spans `members` `(n,)`, no two of one group, from their logits `(n, 4G, 4G)`."""
        candidates = (self.span_groups[members, None] == self.mask_groups) & self.free  # (n, M)
        place, mask = candidates.nonzero(as_tuple=True)
        predicted = logits.float().sigmoid().flatten(1)[place]
        target = self.low_res_masks.sigmoid().flatten(1)[mask]
        overlap = 2 * (predicted * target).sum(1) / (predicted.sum(1) + target.sum(1)).clamp(min=1e-6)
        scores = torch.full(candidates.shape, -1.0, device=logits.device)
        scores[place, mask] = overlap
        taken = scores.argmax(dim=1)
        self.of_span[members], self.free[taken] = taken, False

    def feed_back(self, members: torch.LongTensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the masks `(n, 4G, 4G)` of the spans `members`, which have their targets, for the later spans."""
        true = self.low_res_masks[self.of_span[members]].to(logits)
        return torch.where(self.forced[members, None, None], true, logits)


class SampledPrompts:
    """
    Further decodes of spans in training with prompts by chance, as SAM was trained (arXiv 2304.02643, appendix A).

    The first decode of a span has a click in the error region of its own mask, with this mask, in one half of all
    cases, and a click inside the true mask or a box around it in a quarter each. Each further decode adds a click in
    the error region of the decode before, whose mask it gets. A click is a uniformly drawn pixel of the larger of the
    two error regions, missed and excess pixels.

    Half of the spans are decoded without their query: only prompts and mask say what is meant. Beside a query that
    finds its part already, nothing depends on where a click is, and a decoder trained from scratch does not learn it.

    Args:
        targets: Receives the true mask of each span during decoding.
        rounds: `(S,)` number of prompted decodes of each span, 0 for none.
        draws: `(S, PROMPT_DRAWS)` numbers in [0, 1): the kind of the first prompt, the pixel of each click, the
            displacement of the box's sides, and whether the query is left out.
        frames: `(S, 2)` (height, width) in pixels of each span's image within SAM's input.
        image_size: Side of SAM's input in pixels.
    """

    def __init__(
        self,
        targets: MaskTargets,
        rounds: torch.LongTensor,
        draws: torch.Tensor,
        frames: torch.LongTensor,
        image_size: int,
    ):
        self.targets, self.rounds, self.draws = targets, rounds, draws
        self.frames, self.image_size = frames, image_size
        self.blind = draws[:, -1] < BLIND  # spans decoded without their query
        self.dense_prompts: dict[int, torch.Tensor] = {}  # (C, G, G) of the own decode of each span
        self.decoded: list[tuple[torch.LongTensor, torch.Tensor, torch.Tensor]] = []  # spans, masks, scores

    def decode(self, own_masks: torch.Tensor, decode: Callable[..., tuple[torch.Tensor, torch.Tensor]]):
        """
        Run all rounds, once spans have their own masks `(S, 4G, 4G)` and targets. `decode(spans, dense_prompts,
        prompts)` returns masks and scores.
        """
        corrects, boxed = self.draws[:, 0] < 0.5, self.draws[:, 0] >= 0.75
        present = torch.where(corrects[:, None, None], own_masks.detach().float(), -GIVEN_MASK_LOGIT)
        prompts: dict[int, SpanPrompt] = {}
        for number in range(int(self.rounds.max())):
            members = (self.rounds > number).nonzero()[:, 0]
            points, labels = self._click(members, present, self.draws[members, 1 + number])
            boxes = self._boxes(members) if number == 0 else None
            for place, span in enumerate(members.tolist()):
                point, label, before = points[place, None], labels[place, None], prompts.get(span)
                if before is None and boxed[span]:
                    prompts[span] = SpanPrompt(box=boxes[place])
                elif before is None:
                    prompts[span] = SpanPrompt(
                        points=point, labels=label, mask=present[span] if corrects[span] else None
                    )
                else:
                    if before.points is not None:
                        point, label = torch.cat([before.points, point]), torch.cat([before.labels, label])
                    prompts[span] = SpanPrompt(points=point, labels=label, box=before.box, mask=present[span])
            dense = torch.stack([self.dense_prompts[span] for span in members.tolist()])
            masks, scores = decode(members, dense, prompts)
            self.decoded.append((members, masks, scores))
            present = present.index_put((members,), masks.detach().float())

    def with_own(self, masks, scores, mask_labels, sizes):
        """
        Return the spans `(S + R,)` of own decodes followed by the R prompted ones, with their masks, scores, labels
        and sizes, from masks, scores and sizes of the S own ones and all labels.
        """
        own = torch.arange(len(masks), device=masks.device), masks, scores
        spans, masks, scores = map(torch.cat, zip(own, *self.decoded, strict=True))
        return spans, masks, scores, [mask_labels[i] for i in self.targets.of_span[spans].tolist()], sizes[spans]

    @property
    def true_masks(self) -> torch.Tensor:
        return self.targets.low_res_masks[self.targets.of_span]

    @cached_property
    def _regions(self) -> tuple[torch.BoolTensor, torch.BoolTensor]:
        """The true masks `(S, 4G, 4G)`, never empty unless the mask is, and the cells of the images."""
        low_res = self.true_masks
        largest = low_res.amax(dim=(1, 2), keepdim=True)  # a part thinner than half a cell has no logit above 0
        true = (low_res > 0) | ((low_res == largest) & (low_res > -GIVEN_MASK_LOGIT))
        side = low_res.shape[-1]
        centres = (torch.arange(side, device=low_res.device) + 0.5) * (self.image_size / side)
        rows, columns = (centres < self.frames[:, axis, None] for axis in (0, 1))
        return true, rows[:, :, None] & columns[:, None]

    def _click(self, members, present, draws) -> tuple[torch.Tensor, torch.LongTensor]:
        """Return a point `(n, 2)` in pixels of SAM's input and a label `(n,)` for each of the spans `members`."""
        true, visible = (region[members] for region in self._regions)
        found = present[members] > 0
        missed, excess = true & ~found & visible, found & ~true & visible
        adds = missed.sum(dim=(1, 2)) >= excess.sum(dim=(1, 2))
        region = torch.where(adds[:, None, None], missed, excess)
        for other in (true & visible, visible):  # without an error, inside the mask; without a mask, anywhere
            region = torch.where(region.any(dim=(1, 2))[:, None, None], region, other)
        cells = region.flatten(1)
        count = cells.sum(dim=1)
        number = torch.minimum((draws * count).long(), count - 1)
        index = (cells.cumsum(dim=1) > number[:, None]).int().argmax(dim=1)
        side = true.shape[-1]
        points = torch.stack([index % side, index // side], dim=1)
        # SAM's prompt encoder adds half a pixel.
        points = (points + 0.5) * (self.image_size / side) - 0.5
        return points, (adds & true.any(dim=2).any(dim=1)).long()

    def _boxes(self, members) -> torch.Tensor:
        """Return displaced boxes `(n, 4)` around the true masks of spans, in pixels of SAM's input."""
        true, visible = (region[members] for region in self._regions)
        region = torch.where(true.any(dim=2).any(dim=1)[:, None, None], true, visible)
        ends = []
        for axis in (1, 2):  # columns, rows
            inside = region.any(dim=axis).int()  # (n, 4G)
            ends += [inside.argmax(dim=1), inside.shape[1] - inside.flip(1).argmax(dim=1)]
        x0, x1, y0, y1 = (end * (self.image_size / true.shape[-1]) for end in ends)
        sides = torch.stack([x1 - x0, y1 - y0], dim=1).repeat(1, 2)
        # Up to 4.75 standard deviations, so that the corners stay in their order.
        normal = torch.special.ndtri(self.draws[members, -5:-1].double().clamp(1e-6, 1 - 1e-6)).float()
        noise = (normal * BOX_NOISE * sides).clamp(-MAX_BOX_NOISE, MAX_BOX_NOISE)
        limits = self.frames[members].flip(1).repeat(1, 2)
        return (torch.stack([x0, y0, x1, y1], dim=1) + noise).clamp(min=0).minimum(limits)


def check_by_span(name: str, values, count: int) -> dict:
    """Return an input by index of the span. Raises `ValueError` unless all keys are indices of `count` spans."""
    if not isinstance(values or {}, Mapping):
        raise ValueError(f"{name} is a {type(values).__name__}, expected a dict by index of the span in spans.")
    for i in values or {}:
        if isinstance(i, bool) or not isinstance(i, (int, np.integer)) or not 0 <= i < count:
            raise ValueError(f"{name} has key {i!r}, expected the index of one of {count} spans.")
    return {int(i): value for i, value in (values or {}).items()}


def _as_tensor(values, name: str, where: str) -> torch.Tensor:
    try:
        values = torch.as_tensor(values).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"The {name} of {where} are not numbers ({error}); give an array or tensor.") from error
    if not values.isfinite().all():
        raise ValueError(f"The {name} of {where} contain NaN or infinity; give finite numbers.")
    return values


def read_points(points, labels, size: tuple[int, int], *, where: str) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    Return points `(K, 2)`, x and y in pixels of an image of `size` (height, width), and their labels `(K,)`.

    Raises:
        ValueError: A point is outside the image, a label is not 0 or 1, or their numbers differ.
    """
    points = _as_tensor([] if points is None else points, "input_points", where).float()
    labels = _as_tensor([] if labels is None else labels, "input_labels", where)
    if points.numel() and (points.ndim != 2 or points.shape[1] != 2):
        raise ValueError(f"The input_points of {where} have shape {tuple(points.shape)}; give x, y each, (K, 2).")
    if labels.ndim != 1 or not len(points) or len(labels) != len(points):
        raise ValueError(
            f"Found {len(points)} input_points and input_labels of shape {tuple(labels.shape)} for {where}; give at "
            "least one point, and one label each."
        )
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError(f"The input_labels of {where} are {labels.tolist()}; give 1 inside the mask, 0 outside it.")
    height, width = size
    outside = (points < 0).any(dim=1) | (points >= torch.tensor([width, height])).any(dim=1)
    for x, y in points[outside].tolist()[:1]:
        raise ValueError(f"The point ({x:g}, {y:g}) of {where} is outside its image of {width} x {height} pixels.")
    return points, labels.long()


def read_box(box, size: tuple[int, int], *, where: str) -> torch.Tensor:
    """
    Return a box `(4,)`, x0, y0, x1, y1 in pixels of an image of `size` (height, width).

    Raises:
        ValueError: The box is empty or extends beyond the image.
    """
    box = _as_tensor(box, "input_boxes", where).float()
    if tuple(box.shape) != (4,):
        raise ValueError(f"The input_boxes of {where} have shape {tuple(box.shape)}; give x0, y0, x1, y1.")
    x0, y0, x1, y1 = box.tolist()
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"The box {box.tolist()} of {where} is empty; give x0 < x1 and y0 < y1.")
    height, width = size
    if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
        raise ValueError(f"The box {box.tolist()} of {where} is outside its image of {width} x {height} pixels.")
    return box


class PlumMaskDecoding:
    """The part of [`PlumForConditionalGeneration`] that decodes the masks of spans."""

    def decode_masks(
        self,
        hidden_states: torch.Tensor,
        spans: torch.LongTensor,
        sam_image_embeddings: torch.Tensor,
        sam_image_index: torch.LongTensor,
        given_masks: dict[int, torch.Tensor] | None = None,
        prompts: dict[int, SpanPrompt] | None = None,
        targets: MaskTargets | None = None,
        sampled: SampledPrompts | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Decode the masks of spans, conversations in lock-step: step t decodes the t-th span of every row that has one.

        Args:
            hidden_states: `(B, L, D)`.
            spans: `(S, 3)` rows `[row, start, end)`, rows ascending.
            sam_image_embeddings, sam_image_index: As in [`forward`].
            given_masks: Low-res logits `(4G, 4G)` by span index, which replace the prediction of that span.
            prompts: Prompts by span index.
            targets: In training, receives the prediction of each span and selects the mask that is fed back.
            sampled: In training, decodes some spans again, with prompts.

        Returns:
            Low-res logits `(S, 4G, 4G)` and predicted IoUs `(S,)`.
        """
        rows = spans[:, 0].contiguous()
        images = sam_image_index[rows]
        self._check_images_of_spans(rows, images, sam_image_embeddings)
        # The mask branch stays in the precision of its weights: bfloat16 autocast costs it visible accuracy.
        with torch.autocast(hidden_states.device.type, enabled=False):
            dtype = self.sam.mask_decoder.iou_token.weight.dtype
            projected = self.span_projector(hidden_states.to(next(self.span_projector.parameters()).dtype))
            queries = mean_over_spans(projected.to(hidden_states.device), spans).to(dtype)  # (S, C)
            embeddings = sam_image_embeddings.to(queries)
            positions = self._grid_positions(queries)

            def decode(members: torch.LongTensor, dense: torch.Tensor, prompts: dict, *, queries=queries):
                return self._decode_prompted(members, queries, images, embeddings, positions, dense, prompts)

            if self.mask_feedback is None and not given_masks and targets is None:
                every = torch.arange(len(spans), device=spans.device)
                return decode(every, self._no_mask_prompt(queries), prompts or {})
            given = given_masks or {}, prompts or {}
            masks, scores = self._decode_in_lock_step(decode, queries, rows, positions, *given, targets, sampled)
            if sampled is not None:
                sampled.decode(masks, partial(decode, queries=queries.masked_fill(sampled.blind[:, None], 0)))
            return masks, scores

    def supervise_masks(
        self,
        mask_labels: list[torch.Tensor] | None,
        sizes: torch.LongTensor | None,
        *,
        span_groups: torch.LongTensor | None = None,
        mask_groups: torch.LongTensor | None = None,
        teacher_forced: torch.BoolTensor | None = None,
        prompt_rounds: torch.LongTensor | None = None,
        prompt_draws: torch.Tensor | None = None,
    ) -> tuple[MaskTargets | None, SampledPrompts | None]:
        """
        Return `targets` and `sampled` of [`decode_masks`] from inputs of [`forward`] and `(S, 4)` sizes of each span's
        image, each None if not needed. Raises `ValueError` if true masks or sizes are missing.
        """
        needed = prompt_rounds is not None
        targets = self._mask_targets(mask_labels, sizes, span_groups, mask_groups, teacher_forced, needed=needed)
        if not needed:
            return targets, None
        return targets, SampledPrompts(targets, prompt_rounds, prompt_draws, sizes[:, 2:], self.config.sam_image_size)

    def _mask_targets(self, mask_labels, sizes, span_groups, mask_groups, teacher_forced, *, needed):
        """Return targets assigned during decoding, from `(S, 4)` sizes of each span's image; None if not needed."""
        if span_groups is None and teacher_forced is None and not needed:
            return None
        if not mask_labels or sizes is None:
            raise ValueError(
                "teacher_forced, span_groups, mask_groups and prompt_rounds need the true masks: pass mask_labels, "
                "original_sizes and reshaped_input_sizes as well."
            )
        if span_groups is None:
            span_groups = mask_groups = torch.arange(len(sizes), device=sizes.device)
        if len(mask_groups) != len(mask_labels):
            raise ValueError(
                f"Found {len(mask_groups)} mask_groups for {len(mask_labels)} mask_labels; give one each."
            )
        if teacher_forced is None:
            teacher_forced = torch.zeros_like(span_groups, dtype=torch.bool)
        # All masks of a group are about one image, that of its first span.
        first_span = (span_groups == mask_groups[:, None]).int().argmax(dim=1)
        low_res_masks = shrink_mask_labels(
            mask_labels, sizes[first_span], self.config.sam_image_size, self.config.low_res_mask_size
        )
        return MaskTargets(low_res_masks, span_groups, mask_groups, teacher_forced)

    @staticmethod
    def _check_images_of_spans(rows, images, sam_image_embeddings):
        if sam_image_embeddings is None or (images < 0).any():
            missing = rows.tolist() if sam_image_embeddings is None else rows[images < 0].tolist()
            raise ValueError(f"Rows {sorted(set(missing))} have spans to segment but no image.")

    # Weights are read only by calling their module, because the call loads offloaded ones.

    def _grid_positions(self, like: torch.Tensor) -> torch.Tensor:
        """Return SAM's positions `(1, C, G, G)` of its grid cells, on the device and in the precision of `like`."""
        grid = self.config.sam_grid_size
        embedding = self.sam.shared_image_embedding
        centres = (torch.arange(grid, device=like.device, dtype=embedding.positional_embedding.dtype) + 0.5) / grid
        rows, columns = torch.meshgrid(centres, centres, indexing="ij")
        return embedding(torch.stack([columns, rows], dim=-1)).permute(2, 0, 1)[None].to(like)

    def _no_mask_prompt(self, like: torch.Tensor) -> torch.Tensor:
        """Return SAM's dense prompt "no mask" for each of n queries `(n, C)`, as a view `(n, C, G, G)`."""
        grid = self.config.sam_grid_size
        first = torch.zeros(1, dtype=torch.long, device=like.device)
        embedding = self.sam.prompt_encoder.no_mask_embed(first).to(like)  # (1, C)
        return embedding[..., None, None].expand(len(like), -1, grid, grid)

    def _decode_prompted(self, members, queries, images, embeddings, positions, dense, prompts):
        """
        Decode the masks of spans `members` `(n,)`, with prompts by span index: `(n, 4G, 4G)` logits, `(n,)` IoUs. A
        mask among the prompts replaces the span's dense prompt in `dense` `(n, C, G, G)`.
        """
        sparse, images, forms = queries[members, None], images[members], {}
        for place, span in enumerate(members.tolist() if prompts else []):
            if span in prompts:
                forms.setdefault(prompts[span].form, []).append(place)
        if not forms:
            return self._decode_step(sparse, images, embeddings, positions, dense)
        if sum(map(len, forms.values())) < len(members):
            # All spans, so that those without prompts are computed in the same batch as in a call without any.
            masks, scores = self._decode_step(sparse, images, embeddings, positions, dense)
        else:
            size = self.config.low_res_mask_size
            masks, scores = dense.new_empty(len(members), size, size), dense.new_empty(len(members))
        for places in forms.values():
            some = [prompts[span] for span in members[places].tolist()]
            further, of_masks = self.segmenter.embed_prompts(self.sam, some, like=queries)
            tokens = sparse[places] if further is None else torch.cat([sparse[places], further], dim=1)
            masks[places], scores[places] = self._decode_step(
                tokens, images[places], embeddings, positions, dense[places] if of_masks is None else of_masks
            )
        return masks, scores

    def _decode_step(self, sparse, images, embeddings, positions, dense) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Run SAM's mask decoder with sparse prompts `(n, P, C)` and a dense prompt each: `(n, 4G, 4G)` logits, `(n,)`
        IoUs.
        """
        # A batch saves time while its images fit into CPU caches; 16 prompts at once on a grid of 64 x 64 take
        # twice as long as one by one.
        on_cpu = sparse.device.type == "cpu"
        chunk = max(1, CPU_CELLS_AT_ONCE // self.config.sam_grid_size**2) if on_cpu else PROMPTS_AT_ONCE
        masks, iou_scores = [], []
        for start in range(0, len(sparse), chunk):
            members = slice(start, start + chunk)
            decoded, scores = self.segmenter.decode(
                self.sam,
                embeddings[images[members]],
                positions.expand(len(sparse[members]), -1, -1, -1),
                sparse[members],
                dense[members],
            )
            masks.append(decoded.to(sparse.device))
            iou_scores.append(scores.to(sparse.device))
        return torch.cat(masks), torch.cat(iou_scores)

    def _sizes_of_image(self, name: str, i: int, spans, images) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (height, width) of the image of span i as given and as resized; `name` is the input that needs it."""
        if images.original_sizes is None or images.reshaped_sizes is None:
            raise ValueError(f"{name} need original_sizes and reshaped_input_sizes; pass them as well.")
        row = spans[i : i + 1, 0]
        self._check_images_of_spans(row, images.index[row], images.sam_embeddings)
        image = images.index[row[0]]
        return tuple(images.original_sizes[image].tolist()), tuple(images.reshaped_sizes[image].tolist())

    def _downscale_given_masks(self, given_masks, spans, images):
        """Return low-res logits by span index of the given masks, each checked."""
        given = {}
        for i, mask in check_by_span("given_masks", given_masks, len(spans)).items():
            if not isinstance(mask, (np.ndarray, torch.Tensor)):
                raise ValueError(
                    f"The given mask of span {i} is of type {type(mask).__name__}, expected an array or tensor "
                    "(height, width)."
                )
            original, reshaped = self._sizes_of_image("given_masks", i, spans, images)
            mask = torch.as_tensor(mask, device=spans.device)
            if tuple(mask.shape) != original:
                raise ValueError(f"The given mask of span {i} is {tuple(mask.shape)} but its image is {original}.")
            if not mask.isfinite().all():
                raise ValueError(f"The given mask of span {i} has values that are not numbers; give 0 or 1.")
            (given[i],) = downscale_masks(
                (mask != 0)[None], self.config.sam_image_size, reshaped, self.config.low_res_mask_size
            )
        return given

    def _read_given_spans(self, spans, images, given_masks, prompts) -> dict[str, dict]:
        """Return the inputs `given_masks` and `prompts` of [`decode_masks`] from given masks and inputs of PROMPTS."""
        given_masks = self._downscale_given_masks(given_masks, spans, images)
        inputs = zip(PROMPTS, prompts, strict=True)
        prompts = [check_by_span(name, values, len(spans)) for name, values in inputs]
        read = {}
        for i in sorted({i for values in prompts for i in values}):
            if i in given_masks:
                raise ValueError(f"Span {i} has a given mask, which replaces its prediction, and prompts; give one.")
            points, labels, box, mask = (values.get(i) for values in prompts)
            original, reshaped = self._sizes_of_image("Prompts", i, spans, images)
            scale = torch.tensor([reshaped[1] / original[1], reshaped[0] / original[0]], device=spans.device)
            if points is not None or labels is not None:
                points, labels = read_points(points, labels, original, where=f"span {i}")
                points, labels = points.to(spans.device) * scale, labels.to(spans.device)
            if box is not None:
                box = read_box(box, original, where=f"span {i}").to(spans.device) * scale.repeat(2)
            if mask is not None:
                mask = self._read_present_mask(mask, original, reshaped, where=f"span {i}").to(spans.device)
            read[i] = SpanPrompt(points=points, labels=labels, box=box, mask=mask)
        return {"given_masks": given_masks, "prompts": read}

    def _read_present_mask(self, mask, original, reshaped, *, where: str) -> torch.Tensor:
        """Return low-res logits of a mask: binary at the size of the image, or such logits themselves."""
        side = self.config.low_res_mask_size
        mask = _as_tensor(mask, "input_masks", where)
        expected = (side, side) if mask.is_floating_point() else original
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"The input_masks of {where} are {mask.dtype} of shape {tuple(mask.shape)}; give booleans or integers "
                f"of the size of its image, {original}, or low-res logits in floats, {(side, side)}."
            )
        if mask.is_floating_point():
            return mask
        return downscale_masks((mask != 0)[None], self.config.sam_image_size, reshaped, side)[0]

    def _decode_in_lock_step(self, decode, queries, rows, positions, given_masks, prompts, targets, sampled):
        first = torch.searchsorted(rows, rows)  # index of the first span of the same row
        step = torch.arange(len(rows), device=rows.device) - first
        last_step = step[torch.searchsorted(rows, rows, right=True) - 1]
        masks, iou_scores, members_of_step = [], [], []
        keys, values = None, None  # (n, t, G*G, C) of the earlier masks of the remaining rows
        for t in range(int(step.max()) + 1):
            members = (step == t).nonzero()[:, 0]
            dense = self._no_mask_prompt(queries[members])
            if keys is not None:
                dense = self.mask_feedback(keys, values)
            decoded, scores = decode(members, dense, prompts)
            decoded, scores = self._replace_given(members, decoded, scores, given_masks)
            fed_back = decoded
            if targets is not None:
                targets.assign(members, decoded)
                fed_back = targets.feed_back(members, decoded)
            if sampled is not None:
                sampled.dense_prompts |= zip(members.tolist(), dense, strict=True)
            masks.append(decoded)
            iou_scores.append(scores)
            members_of_step.append(members)
            goes_on = last_step[members] > t
            if self.mask_feedback is not None and goes_on.any():
                new_keys, new_values = self.mask_feedback.embed(
                    fed_back[goes_on], queries[members[goes_on]], positions, self.sam.prompt_encoder.mask_embed
                )
                keys, values = (
                    new[:, None] if earlier is None else torch.cat([earlier[goes_on], new[:, None]], dim=1)
                    for earlier, new in ((keys, new_keys), (values, new_values))
                )
        order = torch.cat(members_of_step).argsort()
        return torch.cat(masks)[order], torch.cat(iou_scores)[order]

    @staticmethod
    def _replace_given(members, masks, iou_scores, given_masks):
        """Return the masks and scores of one step with given masks, and a score of 1, in their places."""
        for place, span in enumerate(members.tolist() if given_masks else []):
            if span in given_masks:
                chosen = torch.arange(len(masks), device=masks.device) == place
                masks = torch.where(chosen[:, None, None], given_masks[span].to(masks), masks)
                iou_scores = torch.where(chosen, torch.ones_like(iou_scores), iou_scores)
        return masks, iou_scores
