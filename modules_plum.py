"""
Span tagger, spans and losses.

A *low-res mask* has 4G x 4G logits in the frame of SAM's padded square input. Each loss is a sum over its items
divided by `count`, a scalar tensor: the number of items of the batch, or of the global batch (gradient accumulation,
several processes), see [`count_loss_items`].

Shapes. B rows, L tokens, S spans of the whole batch, n of them at a time, N images, D language width, C SAM width,
G grid side, H/W pixels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

try:
    from .configuration_plum import PlumConfig
    from .segmentation_plum import mean_over_spans
    from .segmenters_plum import label_frame, label_in_frame, upscale_masks
except ImportError:
    if __package__:
        raise
    from configuration_plum import PlumConfig
    from segmentation_plum import mean_over_spans
    from segmenters_plum import label_frame, label_in_frame, upscale_masks

# Labels of a token: the classes of the span tagger, and the ignored label.
TAG_OUTSIDE, TAG_BEGIN, TAG_INSIDE = 0, 1, 2
IGNORE_INDEX = -100
MASK_LOSSES = ("mask_overlap", "mask_bce", "mask_iou")
# Number of mask pixels whose losses are computed at once. For more masks, intermediate results are recomputed in the
# backward pass.
MASK_PIXELS_AT_ONCE = 2**22
# The same for logits over the vocabulary.
LOGITS_AT_ONCE = 2**22


class PlumSelfAttention(nn.MultiheadAttention):
    """torch's attention with its output projection called as a module, because calls load offloaded weights."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Return `(B, L, D)` from `(B, L, D)` hidden states and a `(B, L)` mask (1 = real token)."""
        projected = F.linear(hidden_states, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3 D)
        projected = projected.unflatten(2, (3, self.num_heads, self.head_dim))
        queries, keys, values = projected.permute(2, 0, 3, 1, 4)  # (B, heads, L, D / heads) each
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class PlumSpanTaggerLayer(nn.Module):
    """A post-norm transformer layer with the parameters of `nn.TransformerEncoderLayer`; it calls all its modules."""

    def __init__(self, width: int, num_heads: int, intermediate_size: int):
        super().__init__()
        self.self_attn = PlumSelfAttention(width, num_heads, batch_first=True)
        self.linear1 = nn.Linear(width, intermediate_size)
        self.linear2 = nn.Linear(intermediate_size, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        hidden_states = self.norm1(hidden_states + self.self_attn(hidden_states, attention_mask))
        return self.norm2(hidden_states + self.linear2(F.relu(self.linear1(hidden_states))))


class PlumSpanTagger(nn.Module):
    """O/B/I logits per token: a bidirectional post-norm encoder over the hidden states, then a small classifier."""

    has_loss = True

    def __init__(self, config: PlumConfig):
        super().__init__()
        width = config.vlm_config.get_text_config().hidden_size
        self.layers = nn.ModuleList(
            PlumSpanTaggerLayer(width, config.span_tagger_num_heads, config.span_tagger_intermediate_size)
            for _ in range(config.span_tagger_num_layers)
        )
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, input_ids: torch.LongTensor
    ) -> torch.Tensor:
        """Return `(B, L, 3)` logits from `(B, L, D)` hidden states and a `(B, L)` mask (1 = real token)."""
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask)
        return self.classifier(hidden_states)


class PlumSegTokenTagger(nn.Module):
    """
    The tagger of a model with `span_source="seg_token"`, without parameters: the special token is B with certainty,
    and every other token O.
    """

    has_loss = False

    def __init__(self, config: PlumConfig):
        super().__init__()
        self.seg_token_id = config.seg_token_id

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, input_ids: torch.LongTensor
    ) -> torch.Tensor:
        """Return logits as [`PlumSpanTagger`] does, from the ids `(B, L)` only."""
        tags = torch.where(input_ids == self.seg_token_id, TAG_BEGIN, TAG_OUTSIDE)
        return F.one_hot(tags, num_classes=3).to(hidden_states.dtype).log()


SPAN_TAGGERS = {"tagger": PlumSpanTagger, "seg_token": PlumSegTokenTagger}


def decode_spans(tags: torch.LongTensor, answer_mask: torch.BoolTensor | None = None) -> torch.LongTensor:
    """
    Return the spans of BIO tags: a B and the I's directly after it; an I without an open span is ignored.

    Args:
        tags: `(B, L)` with 0 = O, 1 = B, 2 = I.
        answer_mask: `(B, L)`; positions outside count as O.

    Returns:
        `(S, 3)` rows `[row, start, end)`, in order of row and start.
    """
    if answer_mask is not None:
        tags = tags.masked_fill(~answer_mask, TAG_OUTSIDE)
    rows, starts = (tags == TAG_BEGIN).nonzero(as_tuple=True)
    # The span of a B ends at the first later position that is not I.
    position = torch.arange(tags.shape[1] + 1, device=tags.device)
    not_inside = F.pad(tags != TAG_INSIDE, (0, 1), value=True)
    is_end = not_inside[rows] & (position[None] > starts[:, None])
    return torch.stack([rows, starts, is_end.int().argmax(dim=1)], dim=1)


def check_spans(spans: torch.LongTensor, shape: tuple[int, int]):
    """Raise `ValueError` unless `spans` `(S, 3)` are `[row, start, end)` in B rows of L tokens, sorted, not empty."""
    if spans.ndim != 2 or spans.shape[1] != 3 or spans.is_floating_point():
        raise ValueError(
            f"spans must be integers of shape (S, 3), [row, start, end), found {spans.dtype} {tuple(spans.shape)}."
        )
    previous = (0, 0)
    for i, (row, start, end) in enumerate(spans.tolist()):
        where = f"Span {i} is {[row, start, end]}"
        if not (0 <= row < shape[0] and 0 <= start and end <= shape[1]):
            raise ValueError(f"{where}, out of range: there are {shape[0]} rows of {shape[1]} tokens.")
        if start >= end:
            raise ValueError(f"{where}, which contains no token: its end must be after its start.")
        if (row, start) < previous:
            raise ValueError(
                f"{where}, after one that starts at {list(previous)}; spans must be sorted by row and start."
            )
        previous = (row, start)


def keep_last_answer(labels: torch.LongTensor) -> torch.LongTensor:
    """Return the labels (B, L) of the last answer of each row; labels of earlier answers become -100."""
    answered = labels != IGNORE_INDEX
    number = (answered & ~F.pad(answered, (1, 0))[:, :-1]).cumsum(dim=1)
    return labels.masked_fill(number < number[:, -1:], IGNORE_INDEX)


def count_loss_items(
    config: PlumConfig, labels=None, span_labels=None, spans=None, mask_labels=None, prompt_rounds=None
) -> dict[str, torch.Tensor]:
    """
    Return the divisor of each loss: target tokens, summed class weight of the supervised tags, masks (own and
    prompted), spans. Arguments as in `PlumForConditionalGeneration.forward`; counts of several batches may be added.
    """
    counts = {
        "tokens": torch.zeros(()) if labels is None else (labels[:, 1:] != IGNORE_INDEX).sum(),
        "tag_weight": torch.zeros(()),
        "masks": torch.tensor(float(len(spans)) if mask_labels else 0.0),
        "spans": torch.tensor(0.0 if spans is None else float(len(spans))),
    }
    if prompt_rounds is not None:
        counts["masks"] = counts["masks"].to(prompt_rounds.device) + prompt_rounds.sum()
    if span_labels is not None:
        targets = span_targets(span_labels, config.span_loss_scope)
        class_weights = torch.tensor([*config.span_class_weights, 0.0], device=targets.device)
        counts["tag_weight"] = class_weights[targets].sum()  # index -1 is the zero weight of ignored tags
    return {name: value.float() for name, value in counts.items()}


def span_targets(span_labels: torch.Tensor, scope: str) -> torch.Tensor:
    """Return the targets 0/1/2 or -1 (ignored) of `span_labels` `(B, L)`, according to `span_loss_scope`."""
    if scope == "answer":
        return span_labels.clamp(min=-1)
    has_span = (span_labels > TAG_OUTSIDE).any(dim=1, keepdim=True)
    return torch.where(has_span, span_labels.clamp(min=TAG_OUTSIDE), -1)


def language_modeling_loss(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    count: torch.Tensor,
) -> torch.Tensor:
    """
    Return the cross-entropy with the next token of `labels` `(B, L)`, from `hidden_states` `(B, L, D)`. Logits are
    computed only where there is a label, and their probabilities a few rows at a time.

    Args:
        logits_of: Returns the logits `(1, T, vocab_size)` of hidden states `(1, T, D)`.
    """
    labelled = labels[:, 1:] != IGNORE_INDEX
    targets = labels[:, 1:][labelled]  # (T,)
    # One call for all, because sharded weights need the same number of calls on every process.
    logits = logits_of(hidden_states[:, :-1][labelled][None])[0]  # (T, vocab_size)
    rows = max(1, LOGITS_AT_ONCE // logits.shape[1])
    if len(targets) <= rows:
        loss = _sum_token_losses(logits, targets)
    else:
        parts = zip(logits.split(rows), targets.split(rows), strict=True)
        options = {"use_reentrant": False, "preserve_rng_state": False}
        loss = sum(checkpoint(_sum_token_losses, *part, **options) for part in parts)
    return loss / count.to(loss).clamp(min=1)


def _sum_token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def span_tagging_loss(
    config: PlumConfig, span_logits: torch.Tensor, span_labels: torch.Tensor, count: torch.Tensor
) -> torch.Tensor:
    """Return the weighted cross-entropy of `span_logits` `(B, L, 3)` with `span_labels` `(B, L)`."""
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
    Return overlap, cross-entropy and IoU losses, at the size of each image or, if it is larger, of SAM's input.

    Args:
        pred_masks, iou_scores: `(S, 4G, 4G)` low-res logits and `(S,)` predicted IoUs.
        mask_labels: S masks `(H, W)`, 0/1, of the size of their image or of [`label_frame`].
        sizes: `(S, 4)`, (height, width) in pixels of each span's image as given and as resized for SAM.

    Raises:
        ValueError: The number of masks differs from that of spans, or the size of a mask from its image.
    """
    if len(mask_labels) != len(pred_masks):
        raise ValueError(f"Found {len(mask_labels)} mask_labels for {len(pred_masks)} spans; give one mask each.")
    totals = torch.zeros(len(MASK_LOSSES), device=pred_masks.device)
    # Spans of images of equal size form one group.
    for size in sizes.unique(dim=0):
        members = (sizes == size).all(dim=1).nonzero()[:, 0]
        original, reshaped = tuple(size[:2].tolist()), tuple(size[2:].tolist())
        frame = label_frame(original, reshaped)
        parts = members.split(max(1, MASK_PIXELS_AT_ONCE // (frame[0] * frame[1])))
        for part in parts:
            targets = torch.stack([label_in_frame(mask_labels[i], original, frame) for i in part.tolist()])
            inputs = (config, pred_masks[part], iou_scores[part], targets.to(pred_masks.device), reshaped)
            if len(parts) == 1:
                totals = totals + _sum_mask_losses(*inputs)
            else:
                totals = totals + checkpoint(_sum_mask_losses, *inputs, use_reentrant=False, preserve_rng_state=False)
    return dict(zip(MASK_LOSSES, totals / count.to(totals).clamp(min=1), strict=True))


def _sum_mask_losses(config: PlumConfig, pred_masks, iou_scores, targets, reshaped) -> torch.Tensor:
    """Return the losses of MASK_LOSSES, each summed over masks whose labels `(n, H, W)` have one size."""
    side = config.sam_image_size
    logits = upscale_masks(pred_masks.float(), side, reshaped, tuple(targets.shape[1:]))
    targets = targets.to(logits)
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=(1, 2))
    predicted, actual = logits.detach() > 0, targets > 0.5
    union = (predicted | actual).sum(dim=(1, 2)).clamp(min=1)
    iou = (predicted & actual).sum(dim=(1, 2)) / union
    squared_error = (iou_scores.float() - iou).square()
    return torch.stack([overlap_loss(config, logits, targets).sum(), bce.sum(), squared_error.sum()])


def overlap_loss(config: PlumConfig, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the overlap loss `(S,)` of the config for `(S, H, W)` logits and 0/1 targets."""
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
    Return `(1 - T) ** gamma`, `T = TP / (TP + a FN + b FP)` over probabilities (Abraham and Khan, arXiv 1810.07842).

    Args:
        logits, targets: `(S, H, W)`, targets 0/1.

    Returns:
        Losses `(S,)`. The base of the power is clamped above zero, where its gradient is infinite.
    """
    probabilities, targets = logits.sigmoid().flatten(1), targets.flatten(1)
    true_positive = (probabilities * targets).sum(1)
    false_negative = ((1 - probabilities) * targets).sum(1)
    false_positive = (probabilities * (1 - targets)).sum(1)
    weighted = true_positive + false_negative_weight * false_negative + false_positive_weight * false_positive
    tversky_index = (true_positive + 1e-6) / (weighted + 1e-6)
    return (1 - tversky_index).clamp(min=1e-7) ** gamma


def dice_loss(logits: torch.Tensor, targets: torch.Tensor, scale: float = 1000.0) -> torch.Tensor:
    """Return the soft dice loss `(S,)` of `(S, H, W)` logits and 0/1 targets; sums are divided by `scale` first."""
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
    Return the KL of two Gaussians of standard deviation `sigma` around the hidden states `(B, L, D)` of student and
    teacher, averaged over the tokens of each span `(S, 3)`.
    """
    squared = (hidden_states.float() - teacher_hidden_states.float()).square().mean(dim=-1, keepdim=True)
    loss = 0.5 / sigma**2 * mean_over_spans(squared, spans).sum()
    return loss / count.to(loss).clamp(min=1)
