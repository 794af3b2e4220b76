"""
The losses that PLUM is trained with.

Each is a sum over its items divided by `count`, a scalar tensor: the number of items of the batch, or of the larger
batch of which it is a part (gradient accumulation, several processes), see [`count_loss_items`].

Shapes. B rows, L tokens, S spans of the whole batch, D language width, G grid side, H/W pixels.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

try:
    from .configuration_plum import PlumConfig
    from .heads_plum import IGNORE_INDEX, TAG_OUTSIDE, mean_over_spans
    from .masks_plum import downscale_masks, label_frame, shrink_mask, upscale_masks
except ImportError:
    if __package__:
        raise
    from configuration_plum import PlumConfig
    from heads_plum import IGNORE_INDEX, TAG_OUTSIDE, mean_over_spans
    from masks_plum import downscale_masks, label_frame, shrink_mask, upscale_masks

MASK_LOSSES = ("mask_overlap", "mask_bce", "mask_iou")
# Pixels of masks whose losses are computed at once. What more masks need for their gradients is computed again in the
# backward pass instead of being kept.
MASK_PIXELS_AT_ONCE = 2**22


def count_loss_items(
    config: PlumConfig, labels=None, span_labels=None, spans=None, mask_labels=None
) -> dict[str, torch.Tensor]:
    """
    What each loss of a batch is divided by: target tokens, summed class weight of the supervised tags, masks, spans.
    Arguments as in `PlumForConditionalGeneration.forward`; the counts of several batches may be added.
    """
    counts = {
        "tokens": torch.zeros(()) if labels is None else (labels[:, 1:] != IGNORE_INDEX).sum(),
        "tag_weight": torch.zeros(()),
        "masks": torch.tensor(float(len(spans)) if mask_labels else 0.0),
        "spans": torch.tensor(0.0 if spans is None else float(len(spans))),
    }
    if span_labels is not None:
        targets = span_targets(span_labels, config.span_loss_scope)
        class_weights = torch.tensor([*config.span_class_weights, 0.0], device=targets.device)
        counts["tag_weight"] = class_weights[targets].sum()  # index -1 is the zero that stands for "ignored"
    return {name: value.float() for name, value in counts.items()}


def span_targets(span_labels: torch.Tensor, scope: str) -> torch.Tensor:
    """Targets 0/1/2 or -1 (ignored) of `span_labels` `(B, L)`, according to `span_loss_scope`."""
    if scope == "answer":
        return span_labels.clamp(min=-1)
    has_span = (span_labels > TAG_OUTSIDE).any(dim=1, keepdim=True)
    return torch.where(has_span, span_labels.clamp(min=TAG_OUTSIDE), -1)


class MaskTargets:
    """
    The true mask of each span, chosen while the spans are decoded, and the masks that are fed back in their place.

    Spans of one answer with the same words are interchangeable: they form a group with the masks of these words. Each
    span takes, in decoding order, the mask of its group that its own prediction overlaps best (soft dice), among those
    that no earlier span took. A group of one span and one mask is the ordinary case.

    Args:
        low_res_masks: `(M, 4G, 4G)` true masks as low-res logits; M is at least S.
        span_groups, mask_groups: `(S,)` and `(M,)` group of each span and of each mask.
        forced: `(S,)` bool, the spans whose true mask is fed back instead of their own (teacher forcing).

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
        """Gives each of the spans `members` `(n,)`, no two of a group, its mask; `logits` `(n, 4G, 4G)` are theirs."""
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
        """`(n, 4G, 4G)` masks that the later spans are shown of the spans `members`, which have their masks."""
        true = self.low_res_masks[self.of_span[members]].to(logits)
        return torch.where(self.forced[members, None, None], true, logits)


def shrink_mask_labels(
    mask_labels: list[torch.Tensor], sizes: torch.LongTensor, sam_image_size: int, low_res_size: int
) -> torch.Tensor:
    """
    True masks as low-res logits `(M, 4G, 4G)`.

    Args:
        mask_labels: M masks `(H, W)`, 0/1, at the size of their image or of `label_frame`.
        sizes: `(M, 4)`, (height, width) in pixels of each mask's image as given and as resized for SAM.
    """
    shrunk = torch.empty(len(mask_labels), low_res_size, low_res_size, device=sizes.device)
    for size in sizes.unique(dim=0):
        members = (sizes == size).all(dim=1).nonzero()[:, 0]
        original, reshaped = tuple(size[:2].tolist()), tuple(size[2:].tolist())
        frame = label_frame(original, reshaped)
        masks = torch.stack([_label_in_frame(mask_labels[i], original, frame) for i in members.tolist()])
        shrunk[members] = downscale_masks(masks.to(sizes.device), sam_image_size, reshaped, low_res_size)
    return shrunk


def language_modeling_loss(logits: torch.Tensor, labels: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of `logits` `(B, L, vocab_size)` with the next token of `labels` `(B, L)`, -100 where ignored."""
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
    return loss / count.to(loss).clamp(min=1)


def span_tagging_loss(
    config: PlumConfig, span_logits: torch.Tensor, span_labels: torch.Tensor, count: torch.Tensor
) -> torch.Tensor:
    """Weighted cross-entropy of `span_logits` `(B, L, 3)` with `span_labels` `(B, L)`."""
    loss = F.cross_entropy(
        span_logits.flatten(0, 1).float(),
        span_targets(span_labels, config.span_loss_scope).flatten(),
        weight=torch.tensor(config.span_class_weights, device=span_logits.device),
        ignore_index=-1,
        reduction="sum",
    )
    return loss / count.to(loss).clamp(min=1e-6)


def mask_losses(
    config: PlumConfig,
    pred_masks: torch.Tensor,
    iou_scores: torch.Tensor,
    mask_labels: list[torch.Tensor],
    sizes: torch.LongTensor,
    count: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """
    Overlap, cross-entropy and IoU-prediction losses, at the size of each image or, if it is larger, in SAM's input.

    Args:
        pred_masks, iou_scores: `(S, 4G, 4G)` low-res logits and `(S,)` predicted IoUs.
        mask_labels: S masks `(H, W)`, 0/1, of the size of their image or of [`label_frame`].
        sizes: `(S, 4)`, (height, width) in pixels of each span's image as given and as resized for SAM.

    Raises:
        ValueError: Another number of masks than spans, or a mask of another size than its image.
    """
    if len(mask_labels) != len(pred_masks):
        raise ValueError(f"Found {len(mask_labels)} mask_labels for {len(pred_masks)} spans; give one mask each.")
    totals = torch.zeros(len(MASK_LOSSES), device=pred_masks.device)
    # Spans of images that share their sizes are taken together: one group for a data set of one size.
    for size in sizes.unique(dim=0):
        members = (sizes == size).all(dim=1).nonzero()[:, 0]
        original, reshaped = tuple(size[:2].tolist()), tuple(size[2:].tolist())
        frame = label_frame(original, reshaped)
        parts = members.split(max(1, MASK_PIXELS_AT_ONCE // (frame[0] * frame[1])))
        for part in parts:
            targets = torch.stack([_label_in_frame(mask_labels[i], original, frame) for i in part.tolist()])
            inputs = (config, pred_masks[part], iou_scores[part], targets.to(pred_masks.device), reshaped)
            if len(parts) == 1:
                totals = totals + _sum_mask_losses(*inputs)
            else:
                totals = totals + checkpoint(_sum_mask_losses, *inputs, use_reentrant=False, preserve_rng_state=False)
    return dict(zip(MASK_LOSSES, totals / count.to(totals).clamp(min=1), strict=True))


def _label_in_frame(mask: torch.Tensor, original: tuple[int, int], frame: tuple[int, int]) -> torch.Tensor:
    found = tuple(mask.shape)
    if found not in (original, frame):
        raise ValueError(f"A mask label is {found} pixels but its image is {original}; resize the mask.")
    return mask if found == frame else shrink_mask(mask, frame)


def _sum_mask_losses(config: PlumConfig, pred_masks, iou_scores, targets, reshaped) -> torch.Tensor:
    """The losses of MASK_LOSSES, each summed over masks whose labels `(n, H, W)` have one size."""
    side = config.sam_config.vision_config.image_size
    logits = upscale_masks(pred_masks.float(), side, reshaped, tuple(targets.shape[1:]))
    targets = targets.to(logits)
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=(1, 2))
    predicted, actual = logits.detach() > 0, targets > 0.5
    union = (predicted | actual).sum(dim=(1, 2)).clamp(min=1)
    iou = (predicted & actual).sum(dim=(1, 2)) / union
    squared_error = (iou_scores.float() - iou).square()
    return torch.stack([overlap_loss(config, logits, targets).sum(), bce.sum(), squared_error.sum()])


def overlap_loss(config: PlumConfig, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The overlap loss `(S,)` that the config names, of `(S, H, W)` logits and 0/1 targets."""
    if config.mask_overlap_loss == "dice":
        return dice_loss(logits, targets)
    return focal_tversky_loss(
        logits,
        targets,
        config.tversky_false_negative_weight,
        config.tversky_false_positive_weight,
        config.tversky_focal_exponent,
    )


def focal_tversky_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    false_negative_weight: float,
    false_positive_weight: float,
    gamma: float,
) -> torch.Tensor:
    """
    `(1 - T) ** gamma`, `T = TP / (TP + a FN + b FP)` over soft probabilities (Abraham and Khan, arXiv 1810.07842).

    Args:
        logits, targets: `(S, H, W)`, targets 0/1.

    Returns:
        `(S,)` losses. The base of the power is kept above zero, where its gradient is infinite.
    """
    probabilities, targets = logits.sigmoid().flatten(1), targets.flatten(1)
    true_positive = (probabilities * targets).sum(1)
    false_negative = ((1 - probabilities) * targets).sum(1)
    false_positive = (probabilities * (1 - targets)).sum(1)
    weighted = true_positive + false_negative_weight * false_negative + false_positive_weight * false_positive
    tversky_index = (true_positive + 1e-6) / (weighted + 1e-6)
    return (1 - tversky_index).clamp(min=1e-7) ** gamma


def dice_loss(logits: torch.Tensor, targets: torch.Tensor, scale: float = 1000.0) -> torch.Tensor:
    """Soft dice loss `(S,)` of `(S, H, W)` logits and 0/1 targets; sums are divided by `scale` before adding 1e-6."""
    probabilities, targets = logits.sigmoid().flatten(1), targets.flatten(1)
    intersection = 2 * (probabilities * targets).sum(1) / scale
    total = (probabilities.sum(1) + targets.sum(1)) / scale
    return 1 - (intersection + 1e-6) / (total + 1e-6)


def teacher_kl_loss(
    hidden_states: torch.Tensor,
    teacher_hidden_states: torch.Tensor,
    spans: torch.LongTensor,
    sigma: float,
    count: torch.Tensor,
) -> torch.Tensor:
    """
    KL of two Gaussians of standard deviation `sigma` around the hidden states `(B, L, D)` of student and teacher,
    averaged over the tokens of each span `(S, 3)`.
    """
    squared = (hidden_states.float() - teacher_hidden_states.float()).square().mean(dim=-1, keepdim=True)
    loss = 0.5 / sigma**2 * mean_over_spans(squared, spans).sum()
    return loss / count.to(loss).clamp(min=1)
