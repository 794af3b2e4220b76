"""
Span tagger, spans, losses, and what PLUM adds to generation.

A *low-res mask* has 4G x 4G logits in the frame of SAM's padded square input. Each loss is a sum over its items
divided by `count`, a scalar tensor: the number of items of the batch, or of the global batch (gradient accumulation,
several processes), see [`count_loss_items`].

Shapes. B rows, L tokens, S spans of the whole batch, n of them at a time, N images, D language width, C SAM width,
G grid side, H/W pixels.
"""

import copy
import json
from collections.abc import Callable
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.utils import GENERATION_CONFIG_NAME, cached_file, logging

try:
    from .configuration_plum import PlumConfig
    from .inputs_plum import check_number
    from .segmentation_plum import label_frame, label_in_frame, mean_over_spans, upscale_masks
except ImportError:
    if __package__:
        raise
    from configuration_plum import PlumConfig
    from inputs_plum import check_number
    from segmentation_plum import label_frame, label_in_frame, mean_over_spans, upscale_masks

# Labels of a token: the classes of the span tagger, and the ignored label.
TAG_OUTSIDE, TAG_BEGIN, TAG_INSIDE = 0, 1, 2
IGNORE_INDEX = -100
MASK_LOSSES = ("mask_overlap", "mask_bce", "mask_iou")
# Number of mask pixels whose losses are computed at once. For more masks, intermediate results are recomputed in the
# backward pass.
MASK_PIXELS_AT_ONCE = 2**22
# The same for logits over the vocabulary.
LOGITS_AT_ONCE = 2**22
# Default maximum number of answer tokens; saved with every checkpoint.
DEFAULT_MAX_NEW_TOKENS = 256
# Decoding options that only save time or memory, and embed several tokens by their ids only: without the embeddings of
# the prompt and its image they fail or change the answer. Plain decoding gives the correct one.
SAVINGS = ("assistant_model", "assistant_tokenizer", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp",
           "prefill_chunk_size")  # fmt: skip
# Decoding options that are counts, and the least of each; and those that are other numbers. `generate` checks few of
# them, some only after the first tokens.
COUNTS = {
    **dict.fromkeys(("max_new_tokens", "max_length", "num_beams", "num_return_sequences"), 1),
    **dict.fromkeys(("min_new_tokens", "min_length", "no_repeat_ngram_size", "top_k"), 0),
}
NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty", "max_time")
# Values of `cache_implementation` whose cache has a fixed number of places.
STATIC_CACHES = ("static", "offloaded_static")
# Types of inputs of a language model that may contain tensors.
NESTED = (list, tuple, dict)

logger = logging.get_logger(__name__)


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


class Observer:
    """
    Context that reads or changes the passes of a language model in one thread. [`let_observe`] adds stateless hooks to
    the module once; calls in other threads use the same module and are not affected. Compiled decoding steps are not
    observed: reading a context variable would break their graph (see [`StaticStates`]).
    """

    def __init__(self, decoder: nn.Module):
        self.decoder = decoder

    def __enter__(self):
        self._token = _OBSERVER.set(self)
        return self

    def __exit__(self, *error):
        _OBSERVER.reset(self._token)

    def before(self, args: tuple, inputs: dict) -> tuple[tuple, dict] | None:
        """Return other arguments for a pass, or None."""

    def after(self, inputs: dict, outputs):
        """Return other outputs of a pass, or None."""


_OBSERVER: ContextVar[Observer | None] = ContextVar("plum_observer", default=None)


def _before_pass(decoder: nn.Module, args: tuple, inputs: dict):
    if is_compiled_step(inputs):
        return None
    observer = _OBSERVER.get()
    return observer.before(args, inputs) if observer is not None and observer.decoder is decoder else None


def _after_pass(decoder: nn.Module, args: tuple, inputs: dict, outputs):
    states = getattr(inputs.get("past_key_values"), "plum_states", None)
    if states is not None:
        states.write(outputs.last_hidden_state, inputs)
    if states is not None or is_compiled_step(inputs):
        return None
    observer = _OBSERVER.get()
    return observer.after(inputs, outputs) if observer is not None and observer.decoder is decoder else None


def is_compiled_step(inputs: dict) -> bool:
    """Return whether `generate` is compiling its decoding step, which is called with a cache."""
    return torch.compiler.is_compiling() and inputs.get("past_key_values") is not None


def let_observe(decoder: nn.Module):
    """Add the hooks of [`Observer`] to a language model; called once, when the model is created."""
    decoder.register_forward_pre_hook(_before_pass, with_kwargs=True)
    decoder.register_forward_hook(_after_pass, with_kwargs=True)


class RecordedInputs(Observer):
    """Records the keyword arguments of the language model's next pass in the dictionary `inputs`."""

    def __init__(self, decoder: nn.Module):
        super().__init__(decoder)
        self.inputs: dict = {}

    def before(self, args, inputs):
        self.inputs.update(inputs)


class StaticStates:
    """
    Hidden states `(B, places, D)` of prompts and answers, and their number so far. A static cache carries them as
    `plum_states`, so that a compiled decoding step writes them within its graph, as it does with keys and values. What
    such a step returns would be overwritten by the next one where CUDA graphs are replayed.
    """

    def __init__(self, states: torch.Tensor, inputs: dict, places: int):
        self.states = states.new_zeros(states.shape[0], places, states.shape[2])
        self.length = torch.zeros((), dtype=torch.long, device=states.device)
        for tensor in (self.states, self.length):
            torch._dynamo.mark_static_address(tensor)
        self.write(states, inputs)

    def write(self, states: torch.Tensor, inputs: dict):
        """Append the hidden states `(B, n, D)` of the next tokens, which had these inputs."""
        self.states[:, torch.arange(states.shape[1], device=states.device) + self.length] = states
        self.length.add_(states.shape[1])
        self.last_is_plain = is_plain(inputs)


class GeneratedStates(Observer):
    """
    Context around one call of `generate` that records the hidden states of prompts and answers.

    The sequences must be encoded again if a step is not one token of every row (beams, chunked generation), if the
    decoder takes more than embeddings and positions, or if its cache has no place for another token.
    """

    def __init__(self, decoder: nn.Module):
        super().__init__(decoder)
        self.states: list[torch.Tensor] = []
        self.static: StaticStates | None = None
        self.inputs: dict = {}
        self.observed = 0  # number of tokens of a row up to those of `inputs`

    def after(self, inputs, outputs):
        self.inputs, states, cache = inputs, outputs.last_hidden_state, inputs.get("past_key_values")
        self.observed += states.shape[1]
        if not self.states and type(cache) is StaticCache and {type(layer) for layer in cache.layers} == {StaticLayer}:
            self.static = cache.plum_states = StaticStates(states, inputs, cache.layers[0].max_cache_len)
        else:
            self.states.append(states)

    @torch.no_grad()
    def finish(self, sequences: torch.LongTensor, attention_mask: torch.Tensor) -> torch.Tensor | None:
        """
        Return the hidden states `(B, L, D)` of the generated sequences `(B, L)`, whose last token `generate` did not
        read, or None if they must be encoded again.
        """
        length = sequences.shape[1]
        if not (self._are_whole(*sequences.shape) and self.inputs.get("use_cache", True)):
            return None
        inputs = {name: value for name, value in self.inputs.items() if not isinstance(value, (torch.Tensor, *NESTED))}
        inputs["inputs_embeds"] = self.decoder.get_input_embeddings()(sequences[:, -1:])
        inputs["attention_mask"] = attention_mask
        if self.inputs.get("position_ids") is not None:
            inputs["position_ids"] = self.inputs["position_ids"][..., -1:] + length - self.observed
        last = self.decoder(**inputs).last_hidden_state
        return torch.cat([*self.states, last], dim=1) if self.static is None else self.static.states[:, :length]

    def _are_whole(self, rows: int, length: int) -> bool:
        """Return whether the states are those of all tokens but the last, and the decoder can read the last alone."""
        if self.static is not None:
            found, places, _ = self.static.states.shape
            return found == rows and places >= length == self.static.length + 1 and self.static.last_is_plain
        steps = {tuple(states.shape[:2]) for states in self.states[1:]}
        whole = sum(states.shape[1] for states in self.states) == length - 1
        whole = whole and len(self.states[0]) == rows and steps <= {(rows, 1)}
        return whole and is_plain(self.inputs) and type(self.inputs.get("past_key_values")) is DynamicCache


def is_plain(inputs: dict) -> bool:
    """Return whether a language model's inputs are only embeddings, positions, a mask and a cache."""
    tensors = {name for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    others = {name for name, value in inputs.items() if isinstance(value, NESTED) and value}
    return (
        "inputs_embeds" in tensors
        and tensors <= {"inputs_embeds", "attention_mask", "position_ids"}
        and others <= {"attention_mask"}
    )


def settle_options(
    defaults: GenerationConfig, options: dict, prompt_length: int
) -> tuple[GenerationConfig, dict[str, object]]:
    """
    Return the generation settings of one call, and its options that are not settings (inputs of the model, a
    streamer). Options that only save time but cannot be used are dropped with a warning.

    Args:
        defaults: Settings of the model.
        options: Options of the call, which override them; single options override `generation_config`, and None means
            "not given".

    Raises:
        ValueError: A number is out of range, or the caller passes its own decoding code, `custom_generate`.
    """
    options = {name: value for name, value in options.items() if value is not None}
    given = options.pop("generation_config", None)
    given = {} if given is None else {name: value for name, value in given.to_dict().items() if value is not None}
    settings = copy.deepcopy(defaults)
    for changes in (given, options):
        check_numbers(changes)
        if "max_length" in changes and "max_new_tokens" not in changes:
            changes = {**changes, "max_new_tokens": max(0, changes["max_length"] - prompt_length)}
        rest = settings.update(**changes)
    settings.max_length = None
    if settings.max_new_tokens is None:
        settings.max_new_tokens = DEFAULT_MAX_NEW_TOKENS
    if settings.cache_implementation in STATIC_CACHES:
        # `generate` reserves no place for the last token, which it does not read; [`GeneratedStates`] does.
        settings.max_cache_len = max(settings.max_cache_len or 0, prompt_length + settings.max_new_tokens)
    for name in SAVINGS:
        is_given = rest.pop(name, None) is not None
        if getattr(settings, name, None) is not None:
            is_given = True
            setattr(settings, name, None)
        if is_given:
            logger.warning_once(
                f"{name} is left out: it cannot be used with images, and plain decoding answers alike."
            )
    if rest.get("custom_generate"):
        raise ValueError("custom_generate is not supported: PLUM decodes as transformers does; leave it out.")
    return settings, rest


def check_numbers(options: dict) -> None:
    """Raise a ValueError if a decoding option is not the number that it should be; None means "not given"."""
    for name, value in options.items():
        if value is not None and name in COUNTS:
            check_number(value, name=name, least=COUNTS[name], whole=True)
        elif value is not None and name in NUMBERS:
            check_number(value, name=name)


def stop_tokens(settings: GenerationConfig, device: torch.device) -> torch.LongTensor:
    """Return the tokens that end an answer, on the given device."""
    stop = settings.eos_token_id
    return torch.as_tensor([] if stop is None else stop, device=device, dtype=torch.long).flatten()


def find_ends(
    sequences: torch.LongTensor, prompt_mask: torch.Tensor, settings: GenerationConfig
) -> tuple[torch.Tensor, torch.BoolTensor, torch.BoolTensor]:
    """
    Find the ends of the answers in generated sequences `(B, L)`; `prompt_mask` `(B, P)` is the prompts' attention
    mask.

    Returns:
        Attention mask `(B, L)`, including the stop token; answer mask `(B, L)`, without it; and `(B,)`, whether an
        answer was truncated, so that neither a stop token nor one of `stop_strings` ended it.
    """
    answers = sequences[:, prompt_mask.shape[1] :]
    stops = torch.isin(answers, stop_tokens(settings, answers.device))
    if settings.pad_token_id is not None:
        # A row that ended otherwise is padded while others continue.
        stops = stops | ((answers != settings.pad_token_id).flip(1).cumsum(1).flip(1) == 0)
    before_or_at_stop = stops.cumsum(dim=1) - stops.int() == 0
    attention_mask = torch.cat([prompt_mask, before_or_at_stop.to(prompt_mask)], dim=1)
    answer_mask = torch.cat([torch.zeros_like(prompt_mask, dtype=torch.bool), before_or_at_stop & ~stops], dim=1)
    at_limit = not settings.stop_strings or answers.shape[1] >= settings.max_new_tokens
    return attention_mask, answer_mask, ~stops.any(dim=1) & at_limit


def check_generation_file(name: str, **hub_options) -> bool:
    """
    Return whether a checkpoint has a generation config. Raises `ValueError` if it is damaged, which transformers
    ignores.

    Args:
        name: Folder or Hub name.
        hub_options: As in `from_pretrained`, such as `revision`.
    """
    path = cached_file(
        name,
        GENERATION_CONFIG_NAME,
        **hub_options,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return False
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read as JSON: {error}; restore it, or delete it for the defaults."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, found a {type(content).__name__}; restore it.")
    return True
