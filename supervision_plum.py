"""
True masks of spans during training: which span takes which mask, which masks are fed back, and prompts by chance.

Shapes. S spans of the whole batch, n of them at a time, M true masks, C SAM width, G grid side, H/W pixels. A *low-res
mask* has 4G x 4G logits in the frame of SAM's square input.
"""

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F

try:
    from .configuration_plum import PlumConfig
    from .segmenters_plum import (
        GIVEN_MASK_LOGIT,
        SpanPrompt,
        crop_windows,
        ends_of,
        label_frame,
        label_in_frame,
        largest_share,
        mask_shares,
        share_logits,
        upscale_masks,
        windows_around,
    )
except ImportError:
    if __package__:
        raise
    from configuration_plum import PlumConfig
    from segmenters_plum import (
        GIVEN_MASK_LOGIT,
        SpanPrompt,
        crop_windows,
        ends_of,
        label_frame,
        label_in_frame,
        largest_share,
        mask_shares,
        share_logits,
        upscale_masks,
        windows_around,
    )

# Largest number of prompted decodes of one span in training, and the random numbers that determine their prompts: the
# kind of the first, a pixel for each click, the displacement of a box's sides, the size of windows, whether there is a
# query, the instance.
MAX_PROMPT_ROUNDS = 5
DRAWN = (1, MAX_PROMPT_ROUNDS, 4, 1, 1, 1)
PROMPT_DRAWS = sum(DRAWN)
# Probability that they come without the query of their span, and that clicks with the span's own mask mean any mask
# with its words.
BLIND, ANY_INSTANCE = 0.5, 0.5
# Standard deviation of a box in training as a share of its sides, and the largest displacement in pixels, as in SAM.
BOX_NOISE, MAX_BOX_NOISE = 0.1, 20.0
# Windows in training are up to this many times larger or smaller than those of a user.
WINDOW_NOISE = 1.3


def resize_mask_labels(
    mask_labels: list[torch.Tensor], sizes: torch.LongTensor, sam_image_size: int, *sides: int
) -> list[torch.Tensor]:
    """
    Return true masks in the frame of SAM's input, for each side as the share `(M, side, side)` of each cell inside.

    Args:
        mask_labels: M masks `(H, W)`, 0/1, at the size of their image or of `label_frame`.
        sizes: `(M, 4)`, (height, width) in pixels of each mask's image as given and as resized for SAM.
    """
    resized = [torch.empty(len(mask_labels), side, side, device=sizes.device) for side in sides]
    for size in sizes.unique(dim=0):
        members = (sizes == size).all(dim=1).nonzero()[:, 0]
        original, reshaped = tuple(size[:2].tolist()), tuple(size[2:].tolist())
        frame = label_frame(original, reshaped)
        masks = torch.stack([label_in_frame(mask_labels[i], original, frame) for i in members.tolist()])
        shares = mask_shares(masks.to(sizes.device), sam_image_size, reshaped, *sides)
        for of_all, of_members in zip(resized, shares, strict=True):
            of_all[members] = of_members
    return resized


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


def _nth(candidates: torch.BoolTensor, draws: torch.Tensor) -> torch.LongTensor:
    """Return one of the candidates of each row `(n,)`, by numbers `(n,)` in [0, 1); larger ones give the last."""
    count = candidates.sum(dim=1)
    number = torch.minimum((draws * count).long(), count - 1)
    return (candidates.cumsum(dim=1, dtype=torch.int32) > number[:, None]).int().argmax(dim=1)


def _inner_part(regions: torch.BoolTensor) -> tuple[torch.BoolTensor, torch.LongTensor]:
    """
    Return regions `(n, s, s)` without their pixels near the border, and numbers `(n,)` that order regions by depth
    and, if it is equal, by size. As many pixels are removed, 1, 2, 4, ... on all sides, as leave some.
    """
    inner, order, left, radius = regions, regions.sum(dim=(1, 2)), regions, 0
    while left.any():
        step = max(1, radius)
        for axis in (1, 2):
            sides = _both_sides(left, step, axis)
            left = sides if radius else left & sides  # pixels already stand for their neighbours
        radius += step
        remain = left.any(dim=2).any(dim=1)
        inner = torch.where(remain[:, None, None], left, inner)
        order = order + remain * regions[0].numel()
    return inner, order


def _both_sides(regions: torch.BoolTensor, step: int, axis: int) -> torch.BoolTensor:
    """Return the pixels whose two neighbours at distance `step` along an axis are in the region, as `(n, s, s)`."""
    padding = [0, 0, step, step] if axis == 1 else [step, step]
    padded, size = F.pad(regions, padding), regions.shape[axis]
    return padded.narrow(axis, 0, size) & padded.narrow(axis, 2 * step, size)


class SampledPrompts:
    """
    Further decodes of spans in training with prompts by chance, as SAM was trained (arXiv 2304.02643, appendix A).

    The first decode of a span has a click in the error region of its own mask, with this mask, in one half of all
    cases, and a click inside the true mask or a box around it in a quarter each. Each further decode adds a click in
    the error region of the decode before, whose mask it gets. A click is a uniformly drawn pixel of the inner part of
    the deeper of the two error regions, missed and excess pixels, at a finer resolution than that of low-res masks: in
    these, errors of a good mask vanish, and a click on one would mean more than in training. Prompts with a mask are
    decoded in windows if the model does so.

    Half of the spans are decoded without their query: only prompts and mask say what is meant. Beside a query that
    finds its part already, nothing depends on where a click is, and a decoder trained from scratch does not learn it.
    For the same reason half of the clicks that come with the span's own mask mean any mask with its words, so that a
    click on another instance leads there. Prompts without a mask never do: their dense prompt is the mask feedback,
    which says that instances found earlier are not meant.

    Args:
        targets: Receives the true mask of each span during decoding.
        true_masks: `(M, s, s)` bool, the masks of `targets` in the frame of SAM's input at a finer resolution.
        rounds: `(S,)` number of prompted decodes of each span, 0 for none.
        draws: `(S, PROMPT_DRAWS)` numbers in [0, 1), the columns of DRAWN.
        frames: `(S, 2)` (height, width) in pixels of each span's image within SAM's input.
        image_size: Side of SAM's input in pixels.
        sam_pixels: `(N, 3, image_size, image_size)` images, which windows are cut from.
        window: `correction_window` of the model.
    """

    def __init__(
        self,
        targets: MaskTargets,
        true_masks: torch.BoolTensor,
        rounds: torch.LongTensor,
        draws: torch.Tensor,
        frames: torch.LongTensor,
        image_size: int,
        sam_pixels: torch.Tensor | None = None,
        window: float | None = None,
    ):
        self.targets, self.true_masks, self.rounds, self.frames = targets, true_masks, rounds, frames
        self.image_size, self.sam_pixels = image_size, sam_pixels
        self.cell = image_size / true_masks.shape[-1]  # side in pixels
        kind, self.pixels, self.sides, noise, query, instance = draws.split(DRAWN, dim=1)
        self.window = None if window is None else window * WINDOW_NOISE ** (2 * noise[:, 0] - 1)
        self.instance = instance[:, 0]
        self.corrects = kind[:, 0] < 0.5  # spans whose first prompt comes with their own mask
        self.boxed = kind[:, 0] >= 0.75  # spans whose first prompt is a box
        self.blind = query[:, 0] < BLIND  # spans decoded without their query
        self.dense_prompts: list[tuple[torch.LongTensor, torch.Tensor]] = []  # of own decodes: spans, (n, C, G, G)
        # Prompted decodes: spans, masks, scores, and windows if they are decoded in these.
        self.decoded: list[tuple[torch.LongTensor, torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def decode(self, own_masks: torch.Tensor, decode: Callable[..., tuple[torch.Tensor, torch.Tensor]]):
        """
        Run all rounds, once spans have their own masks `(S, 4G, 4G)` and targets. `decode(spans, dense_prompts,
        prompts, windows)` returns masks and scores of spans with a batch of prompts, in windows `(n, 3)` unless None.
        """
        spans, dense = map(torch.cat, zip(*self.dense_prompts, strict=True))
        dense, boxes = dense[spans.argsort()], self._boxes()
        present = torch.where(self.corrects[:, None, None], own_masks.detach().float(), -GIVEN_MASK_LOGIT)
        present = self._show(present, None)
        points, labels = boxes.new_zeros(*self.pixels.shape, 2), torch.zeros_like(self.pixels, dtype=torch.long)
        for number in range(int(self.rounds.max())):
            goes_on, masked = self.rounds > number, self.corrects | (number > 0)
            members = goes_on.nonzero()[:, 0]
            points[members, number], labels[members, number] = self._click(
                members, present, self.pixels[members, number]
            )
            for has_box, has_mask in ((False, False), (False, True), (True, False), (True, True)):
                members = (goes_on & (self.boxed == has_box) & (masked == has_mask)).nonzero()[:, 0]
                if len(members):
                    clicks = slice(int(has_box), number + 1)  # a box comes instead of the first click
                    clicked = clicks.start < clicks.stop
                    prompts = SpanPrompt(
                        points=points[members, clicks] if clicked else None,
                        labels=labels[members, clicks] if clicked else None,
                        box=boxes[members] if has_box else None,
                        mask=present[members] if has_mask else None,
                    )
                    windows = None
                    if has_mask and self.window is not None:
                        windows = windows_around(
                            prompts.mask > 0, prompts, self.image_size, factor=self.window[members]
                        )
                    masks, scores = decode(members, dense[members], prompts, windows)
                    present[members] = self._show(masks.detach().float(), windows)
                    self.decoded.append((members, masks, scores, windows))

    def _show(self, masks: torch.Tensor, windows: torch.Tensor | None) -> torch.Tensor:
        """Return low-res logits `(n, 4G, 4G)` as a present mask: for windows `(n, image_size, image_size)`."""
        size = self.image_size
        return masks if self.window is None else upscale_masks(masks, size, (size, size), (size, size), windows)

    def with_own(self, masks, scores, mask_labels, sizes):
        """
        Return the true masks `(S + R,)` by index of own decodes followed by the R prompted ones, with their masks,
        scores, labels and sizes, from masks, scores and sizes of the S own ones and all labels.
        """
        true, decoded, all_sizes = [self.targets.of_span], [(masks, scores)], [sizes]
        labels = [mask_labels[i] for i in self.targets.of_span.tolist()]
        for spans, found, found_scores, windows in self.decoded:
            true.append(self.meant[spans])
            decoded.append((found, found_scores))
            if windows is None:
                labels += [mask_labels[i] for i in self.meant[spans].tolist()]
                all_sizes.append(sizes[spans])
            else:
                labels += self._crop(self.meant[spans], windows)
                all_sizes.append(torch.full_like(sizes[spans], self.image_size))
        return torch.cat(true), *map(torch.cat, zip(*decoded, strict=True)), labels, torch.cat(all_sizes)

    def _crop(self, members: torch.LongTensor, windows: torch.Tensor) -> list[torch.BoolTensor]:
        """Return windows of the true masks `members` at the size of SAM's input."""
        size = self.image_size
        return list(crop_windows(self.true_masks[members, None].float(), windows, size, size)[:, 0] > 0.5)

    @cached_property
    def meant(self) -> torch.LongTensor:
        """The mask `(S,)`, by index, that the prompts of each span mean: the one it took, or any with its words."""
        same_words = self.targets.span_groups[:, None] == self.targets.mask_groups  # (S, M)
        any_instance = _nth(same_words, self.instance / ANY_INSTANCE)
        return torch.where(self.corrects & (self.instance < ANY_INSTANCE), any_instance, self.targets.of_span)

    @cached_property
    def _regions(self) -> tuple[torch.BoolTensor, torch.BoolTensor]:
        """The meant masks `(S, 8G, 8G)`, and the cells of the images."""
        centres = (torch.arange(self.true_masks.shape[-1], device=self.frames.device) + 0.5) * self.cell
        rows, columns = (centres < self.frames[:, axis, None] for axis in (0, 1))
        return self.true_masks[self.meant], rows[:, :, None] & columns[:, None]

    def _click(self, members, present, draws) -> tuple[torch.Tensor, torch.LongTensor]:
        """Return a point `(n, 2)` in pixels of SAM's input and a label `(n,)` for each of the spans `members`."""
        true, visible = (region[members] for region in self._regions)
        found = F.interpolate(present[members, None], true.shape[1:], mode="bilinear", align_corners=False)[:, 0] > 0
        missed, excess = (_inner_part(errors & visible) for errors in (true & ~found, found & ~true))
        adds = missed[1] >= excess[1]
        region = torch.where(adds[:, None, None], missed[0], excess[0])
        for other in (true & visible, visible):  # without an error, inside the mask; without a mask, anywhere
            region = torch.where(region.any(dim=(1, 2))[:, None, None], region, other)
        index, side = _nth(region.flatten(1), draws), true.shape[-1]
        points = torch.stack([index % side, index // side], dim=1)
        points = (points + 0.5) * self.cell - 0.5  # SAM's prompt encoder adds half a pixel
        return points, (adds & true.any(dim=2).any(dim=1)).long()

    def _boxes(self) -> torch.Tensor:
        """Return displaced boxes `(S, 4)` around the true masks of spans, in pixels of SAM's input."""
        true, visible = self._regions
        region = torch.where(true.any(dim=2).any(dim=1)[:, None, None], true, visible)
        low, high = ends_of(region, self.cell)  # x, y of the corners
        sides = (high - low).repeat(1, 2)
        # Up to 4.75 standard deviations, so that the corners stay in their order.
        normal = torch.special.ndtri(self.sides.double().clamp(1e-6, 1 - 1e-6)).float()
        noise = (normal * BOX_NOISE * sides).clamp(-MAX_BOX_NOISE, MAX_BOX_NOISE)
        limits = self.frames.flip(1).repeat(1, 2)
        return (torch.cat([low, high], dim=1) + noise).clamp(min=0).minimum(limits)


def supervise_masks(
    config: PlumConfig,
    mask_labels: list[torch.Tensor] | None,
    sizes: torch.LongTensor | None,
    sam_pixels: torch.Tensor | None = None,
    *,
    span_groups: torch.LongTensor | None = None,
    mask_groups: torch.LongTensor | None = None,
    teacher_forced: torch.BoolTensor | None = None,
    prompt_rounds: torch.LongTensor | None = None,
    prompt_draws: torch.Tensor | None = None,
) -> tuple[MaskTargets | None, SampledPrompts | None]:
    """
    Return `targets` and `sampled` of `PlumForConditionalGeneration.decode_masks` from inputs of its `forward` and
    `(S, 4)` sizes of each span's image, each None if not needed. `sam_pixels` are the images for windows.

    Raises:
        ValueError: Inputs are missing, or not one for each span or mask.
    """
    of_spans = {"span_groups": span_groups, "teacher_forced": teacher_forced}
    of_spans |= {"prompt_rounds": prompt_rounds, "prompt_draws": prompt_draws}
    of_spans = {name: values for name, values in of_spans.items() if values is not None}
    if not of_spans:
        return None, None
    if not mask_labels or sizes is None:
        raise ValueError(
            f"{', '.join(of_spans)} need the true masks: pass mask_labels, original_sizes and reshaped_input_sizes "
            "as well."
        )
    if (span_groups is None) != (mask_groups is None) or (prompt_rounds is None) != (prompt_draws is None):
        raise ValueError(
            f"Found {', '.join(of_spans)}; pass span_groups with mask_groups, and prompt_rounds with prompt_draws."
        )
    for name, values in of_spans.items():
        if len(values) != len(sizes):
            raise ValueError(f"Found {len(values)} {name} for {len(sizes)} spans; give one each.")
    if span_groups is None:
        span_groups = mask_groups = torch.arange(len(sizes), device=sizes.device)
    if len(mask_groups) != len(mask_labels):
        raise ValueError(f"Found {len(mask_groups)} mask_groups for {len(mask_labels)} mask_labels; give one each.")
    if teacher_forced is None:
        teacher_forced = torch.zeros_like(span_groups, dtype=torch.bool)
    # All masks of a group are about one image, that of its first span.
    first_span = (span_groups == mask_groups[:, None]).int().argmax(dim=1)
    side, image_size = config.low_res_mask_size, config.sam_image_size
    window = config.correction_window
    if prompt_rounds is not None and window is not None and sam_pixels is None:
        raise ValueError(
            "This model decodes corrected masks in windows of the image: pass sam_pixel_values beside "
            "sam_image_embeddings."
        )
    sides = [side]
    if prompt_rounds is not None:
        sides.append(2 * side if window is None else image_size)
    low_res, *fine = resize_mask_labels(mask_labels, sizes[first_span], image_size, *sides)
    targets = MaskTargets(share_logits(low_res), span_groups, mask_groups, teacher_forced)
    if prompt_rounds is None:
        return targets, None
    drawn = prompt_rounds, prompt_draws, sizes[:, 2:], image_size
    return targets, SampledPrompts(targets, largest_share(fine[0]), *drawn, sam_pixels, window)
