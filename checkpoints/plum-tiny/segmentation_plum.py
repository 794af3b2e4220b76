"""
From the queries of spans to their masks: mask feedback, prompts and given masks, decoding in lock-step.

Shapes. B rows, L tokens, S spans of the whole batch, n of them at a time, N images, D language width, C SAM width,
E channels of an image embedding, G grid side, H/W pixels. A *low-res mask* has 4G x 4G logits in the frame of SAM's
square input.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

try:
    from .backbones_plum import PlumImages
    from .configuration_plum import PlumConfig
    from .segmenters_plum import (
        SpanPrompt,
        crop_windows,
        downscale_masks,
        paste_windows,
        upscale_masks,
        windows_around,
    )
    from .supervision_plum import MaskTargets, SampledPrompts
except ImportError:
    if __package__:
        raise
    from backbones_plum import PlumImages
    from configuration_plum import PlumConfig
    from segmenters_plum import (
        SpanPrompt,
        crop_windows,
        downscale_masks,
        paste_windows,
        upscale_masks,
        windows_around,
    )
    from supervision_plum import MaskTargets, SampledPrompts

# Inputs with the prompts of spans, in transformers' names.
PROMPTS = ("input_points", "input_labels", "input_boxes", "input_masks")
# Mask prompts decoded at once: on a CPU limited by the total number of image cells, elsewhere a fixed number.
CPU_CELLS_AT_ONCE = 16 * 16 * 16
PROMPTS_AT_ONCE = 64
# Windows of images that are encoded at once.
WINDOWS_AT_ONCE = 8


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
            queries = self._span_queries(hidden_states, spans)
            embeddings = sam_image_embeddings.to(queries)
            positions = self._grid_positions(queries)

            def decode(members: torch.LongTensor, dense: torch.Tensor, prompts: dict):
                return self._decode_prompted(members, queries, images, embeddings, positions, dense, prompts)

            if self.mask_feedback is None and not given_masks and targets is None:
                every = torch.arange(len(spans), device=spans.device)
                return decode(every, self._no_mask_prompt(queries), prompts or {})
            given = given_masks or {}, prompts or {}
            masks, scores = self._decode_in_lock_step(decode, queries, rows, positions, *given, targets, sampled)
            if sampled is not None:
                seen = queries.masked_fill(sampled.blind[:, None], 0)

                def decode_sampled(members: torch.LongTensor, dense: torch.Tensor, prompts: SpanPrompt, windows):
                    queries, of_members = seen[members], images[members]
                    if windows is not None:
                        return self._decode_windows(queries, sampled.sam_pixels, of_members, windows, prompts)
                    return self._decode_form(queries, of_members, embeddings, positions, dense, prompts)

                sampled.decode(masks, decode_sampled)
            return masks, scores

    def decode_corrected(
        self,
        hidden_states: torch.Tensor,
        spans: torch.LongTensor,
        images: PlumImages,
        given_masks: dict[int, torch.Tensor] | None = None,
        prompts: dict[int, SpanPrompt] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Decode the masks of spans as [`decode_masks`] does, but spans with a present mask in windows if the model has a
        `correction_window`. Such a mask depends on no other; for later spans it is a given one.

        Returns:
            Low-res logits `(S, 4G, 4G)`, predicted IoUs `(S,)` and windows `(S, 3)`, None without any.

        Raises:
            ValueError: The pixels of the windows are missing.
        """
        prompts, inputs = prompts or {}, (hidden_states, spans, images.sam_embeddings, images.index)
        corrected = [i for i, prompt in prompts.items() if prompt.mask is not None]
        if self.config.correction_window is None or not corrected:
            return *self.decode_masks(*inputs, given_masks, prompts), None
        if images.sam_pixels is None:
            raise ValueError(
                "A corrected mask of this model is decoded in a window of the image; pass sam_pixel_values beside "
                "sam_image_embeddings."
            )
        size, prompted = self.config.sam_image_size, {i: prompts[i] for i in corrected}
        with torch.autocast(hidden_states.device.type, enabled=False):
            members, found, found_scores, places = self._correct_in_windows(hidden_states, spans, images, prompted)
        pasted = paste_windows(found, places, size, self.config.low_res_mask_size)
        given_masks = {**(given_masks or {}), **dict(zip(members.tolist(), pasted, strict=True))}
        others = {i: prompt for i, prompt in prompts.items() if prompt.mask is None}
        masks, scores = self.decode_masks(*inputs, given_masks, others)
        windows = torch.tensor([0.0, 0.0, size], device=masks.device).repeat(len(spans), 1)
        masks[members], scores[members], windows[members] = found, found_scores, places
        return masks, scores, windows

    def _correct_in_windows(self, hidden_states, spans, images, prompts: dict[int, SpanPrompt]):
        """Return the n spans with prompts, their low-res logits, predicted IoUs and windows `(n, 3)`."""
        queries, index, found = self._span_queries(hidden_states, spans), images.index[spans[:, 0]], []
        for keys, some in SpanPrompt.batches(prompts):
            members = torch.tensor(keys, device=spans.device)
            windows = windows_around(some.mask > 0, some, self.config.sam_image_size, self.config.correction_window)
            decoded = self._decode_windows(queries[members], images.sam_pixels, index[members], windows, some)
            found.append((members, *decoded, windows))
        return tuple(map(torch.cat, zip(*found, strict=True)))

    def _decode_windows(self, queries, sam_pixels, images, windows, prompts: SpanPrompt):
        """Decode n masks of a batch of prompts in windows `(n, 3)` of the images `(n,)`; as [`_decode_prompted`]."""
        size, embeddings = self.config.sam_image_size, []
        for some, places in zip(images.split(WINDOWS_AT_ONCE), windows.split(WINDOWS_AT_ONCE), strict=True):
            embeddings.append(self.get_image_embeddings(crop_windows(sam_pixels[some], places, size, size)))
        embeddings, positions = torch.cat(embeddings).to(queries), self._grid_positions(queries)
        prompts = prompts.in_windows(windows, size, self.config.low_res_mask_size)
        every, dense = torch.arange(len(queries), device=queries.device), self._no_mask_prompt(queries)
        return self._decode_form(queries, every, embeddings, positions, dense, prompts)

    def _span_queries(self, hidden_states, spans) -> torch.Tensor:
        """Return the queries `(S, C)` of spans, on their device and in the precision of SAM's mask decoder."""
        projected = self.span_projector(hidden_states.to(next(self.span_projector.parameters()).dtype))
        queries = mean_over_spans(projected.to(hidden_states.device), spans)
        return queries.to(self.sam.mask_decoder.iou_token.weight.dtype)

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
        sparse, images = queries[members, None], images[members]
        spans = enumerate(members.tolist() if prompts else [])
        given = {place: prompts[span] for place, span in spans if span in prompts}
        if not given:
            return self._decode_step(sparse, images, embeddings, positions, dense)
        if len(given) < len(members):
            # All spans, so that those without prompts are computed in the same batch as in a call without any.
            masks, scores = self._decode_step(sparse, images, embeddings, positions, dense)
        else:
            size = self.config.low_res_mask_size
            masks, scores = dense.new_empty(len(members), size, size), dense.new_empty(len(members))
        for places, some in SpanPrompt.batches(given):
            masks[places], scores[places] = self._decode_form(
                queries[members[places]], images[places], embeddings, positions, dense[places], some
            )
        return masks, scores

    def _decode_form(self, queries, images, embeddings, positions, dense, prompts: SpanPrompt):
        """Decode n masks of a batch of prompts beside their queries `(n, C)`; as [`_decode_prompted`]."""
        further, of_masks = self.segmenter.embed_prompts(self.sam, prompts, like=queries)
        tokens = queries[:, None] if further is None else torch.cat([queries[:, None], further], dim=1)
        return self._decode_step(tokens, images, embeddings, positions, dense if of_masks is None else of_masks)

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
        """
        Return logits of a mask, binary at the size of the image or low-res logits, in the frame of SAM's input:
        low-res, or with a value for each of its pixels if masks are corrected in windows.
        """
        side, size = self.config.low_res_mask_size, self.config.sam_image_size
        fine = side if self.config.correction_window is None else size
        mask = _as_tensor(mask, "input_masks", where)
        expected = (side, side) if mask.is_floating_point() else original
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"The input_masks of {where} are {mask.dtype} of shape {tuple(mask.shape)}; give booleans or integers "
                f"of the size of its image, {original}, or low-res logits in floats, {(side, side)}."
            )
        if not mask.is_floating_point():
            return downscale_masks((mask != 0)[None], size, reshaped, fine)[0]
        if fine == side:
            return mask
        return upscale_masks(mask[None], size, (size, size), (size, size))[0]

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
                sampled.dense_prompts.append((members, dense))
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
