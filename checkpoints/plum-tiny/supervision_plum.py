"""
True masks of spans during training: which span takes which mask, which masks are fed back, and prompts by chance.

Shapes. S spans of the whole batch, n of them at a time, M true masks, C SAM width, G grid side, H/W pixels. A *low-res
mask* has 4G x 4G logits in the frame of SAM's square input.
"""

from collections.abc import Callable
from functools import cached_property

import torch

try:
    from .configuration_plum import PlumConfig
    from .segmenters_plum import GIVEN_MASK_LOGIT, SpanPrompt, downscale_masks, label_frame, label_in_frame
except ImportError:
    if __package__:
        raise
    from configuration_plum import PlumConfig
    from segmenters_plum import GIVEN_MASK_LOGIT, SpanPrompt, downscale_masks, label_frame, label_in_frame

# Largest number of prompted decodes of one span in training, and the random numbers that determine their prompts: the
# kind of the first, a pixel for each click, the displacement of a box's sides, whether there is a query, the instance.
MAX_PROMPT_ROUNDS = 5
DRAWN = (1, MAX_PROMPT_ROUNDS, 4, 1, 1)
PROMPT_DRAWS = sum(DRAWN)
# Probability that they come without the query of their span, and that they mean any mask with its words.
BLIND, ANY_INSTANCE = 0.5, 0.5
# Standard deviation of a box in training as a share of its sides, and the largest displacement in pixels, as in SAM.
BOX_NOISE, MAX_BOX_NOISE = 0.1, 20.0


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
    return (candidates.cumsum(dim=1) > number[:, None]).int().argmax(dim=1)


class SampledPrompts:
    """
    Further decodes of spans in training with prompts by chance, as SAM was trained (arXiv 2304.02643, appendix A).

    The first decode of a span has a click in the error region of its own mask, with this mask, in one half of all
    cases, and a click inside the true mask or a box around it in a quarter each. Each further decode adds a click in
    the error region of the decode before, whose mask it gets. A click is a uniformly drawn pixel of the larger of the
    two error regions, missed and excess pixels.

    Half of the spans are decoded without their query: only prompts and mask say what is meant. Beside a query that
    finds its part already, nothing depends on where a click is, and a decoder trained from scratch does not learn it.
    For the same reason the prompts of half of the spans mean any mask with the words of the span, so that a click on
    another instance leads there.

    Args:
        targets: Receives the true mask of each span during decoding.
        rounds: `(S,)` number of prompted decodes of each span, 0 for none.
        draws: `(S, PROMPT_DRAWS)` numbers in [0, 1), the columns of DRAWN.
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
        self.targets, self.rounds = targets, rounds
        self.frames, self.image_size = frames, image_size
        kind, self.pixels, self.sides, query, instance = draws.split(DRAWN, dim=1)
        self.kind, self.instance = kind[:, 0], instance[:, 0]
        self.blind = query[:, 0] < BLIND  # spans decoded without their query
        self.dense_prompts: dict[int, torch.Tensor] = {}  # (C, G, G) of the own decode of each span
        self.decoded: list[tuple[torch.LongTensor, torch.Tensor, torch.Tensor]] = []  # spans, masks, scores

    def decode(self, own_masks: torch.Tensor, decode: Callable[..., tuple[torch.Tensor, torch.Tensor]]):
        """
        Run all rounds, once spans have their own masks `(S, 4G, 4G)` and targets. `decode(spans, dense_prompts,
        prompts)` returns masks and scores.
        """
        corrects, boxed = self.kind < 0.5, self.kind >= 0.75
        present = torch.where(corrects[:, None, None], own_masks.detach().float(), -GIVEN_MASK_LOGIT)
        prompts: dict[int, SpanPrompt] = {}
        for number in range(int(self.rounds.max())):
            members = (self.rounds > number).nonzero()[:, 0]
            points, labels = self._click(members, present, self.pixels[members, number])
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
        Return the true masks `(S + R,)` by index of own decodes followed by the R prompted ones, with their masks,
        scores, labels and sizes, from masks, scores and sizes of the S own ones and all labels.
        """
        own = torch.arange(len(masks), device=masks.device), self.targets.of_span, masks, scores
        prompted = [(spans, self.meant[spans], *decoded) for spans, *decoded in self.decoded]
        spans, true, masks, scores = map(torch.cat, zip(own, *prompted, strict=True))
        return true, masks, scores, [mask_labels[i] for i in true.tolist()], sizes[spans]

    @cached_property
    def meant(self) -> torch.LongTensor:
        """The mask `(S,)`, by index, that the prompts of each span mean: the one it took, or any with its words."""
        same_words = self.targets.span_groups[:, None] == self.targets.mask_groups  # (S, M)
        any_instance = _nth(same_words, self.instance / ANY_INSTANCE)
        return torch.where(self.instance < ANY_INSTANCE, any_instance, self.targets.of_span)

    @cached_property
    def _regions(self) -> tuple[torch.BoolTensor, torch.BoolTensor]:
        """The meant masks `(S, 4G, 4G)`, never empty unless the mask is, and the cells of the images."""
        low_res = self.targets.low_res_masks[self.meant]
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
        index = _nth(region.flatten(1), draws)
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
        normal = torch.special.ndtri(self.sides[members].double().clamp(1e-6, 1 - 1e-6)).float()
        noise = (normal * BOX_NOISE * sides).clamp(-MAX_BOX_NOISE, MAX_BOX_NOISE)
        limits = self.frames[members].flip(1).repeat(1, 2)
        return (torch.stack([x0, y0, x1, y1], dim=1) + noise).clamp(min=0).minimum(limits)


def supervise_masks(
    config: PlumConfig,
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
    Return `targets` and `sampled` of `PlumForConditionalGeneration.decode_masks` from inputs of its `forward` and
    `(S, 4)` sizes of each span's image, each None if not needed.

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
    low_res_masks = shrink_mask_labels(mask_labels, sizes[first_span], config.sam_image_size, config.low_res_mask_size)
    targets = MaskTargets(low_res_masks, span_groups, mask_groups, teacher_forced)
    if prompt_rounds is None:
        return targets, None
    return targets, SampledPrompts(targets, prompt_rounds, prompt_draws, sizes[:, 2:], config.sam_image_size)
