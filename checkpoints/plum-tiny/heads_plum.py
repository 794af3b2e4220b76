"""
The modules that PLUM adds to its two backbones: the span tagger, and the feedback from masks to the next prompt.

Shapes. B rows, L tokens, S spans of the whole batch, D language width, C SAM width, G grid side.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

try:
    from .configuration_plum import PlumConfig
except ImportError:
    if __package__:
        raise
    from configuration_plum import PlumConfig

# What a token is labelled with: the classes of the span tagger, and what no loss looks at.
TAG_OUTSIDE, TAG_BEGIN, TAG_INSIDE = 0, 1, 2
IGNORE_INDEX = -100


class PlumSelfAttention(nn.MultiheadAttention):
    """
    torch's attention, but its output projection is called as a module: where weights are offloaded, calls load them.
    """

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """`(B, L, D)` hidden states and `(B, L)` mask (1 = real token) to `(B, L, D)`."""
        projected = F.linear(hidden_states, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3 D)
        projected = projected.unflatten(2, (3, self.num_heads, self.head_dim))
        queries, keys, values = projected.permute(2, 0, 3, 1, 4)  # (B, heads, L, D / heads) each
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class PlumSpanTaggerLayer(nn.Module):
    """A post-norm transformer layer with the parameters of `nn.TransformerEncoderLayer`; it calls all of its parts."""

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

    def __init__(self, config: PlumConfig):
        super().__init__()
        width = config.vlm_config.get_text_config().hidden_size
        self.layers = nn.ModuleList(
            PlumSpanTaggerLayer(width, config.span_tagger_num_heads, config.span_tagger_intermediate_size)
            for _ in range(config.span_tagger_num_layers)
        )
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """`(B, L, D)` hidden states and `(B, L)` mask (1 = real token) to `(B, L, 3)` logits."""
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask)
        return self.classifier(hidden_states)


class PlumMaskFeedback(nn.Module):
    """
    The dense prompt of a span, made from the masks of the earlier spans of its conversation.

    Each earlier mask runs through SAM's own mask embedding (passed in, so the weights exist once), modulated by that
    span's query before each activation (FiLM, arXiv 1709.07871); then, per grid cell, a learned query attends over
    the earlier masks.
    """

    def __init__(self, config: PlumConfig):
        super().__init__()
        width = config.sam_config.vision_config.output_channels
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
        Keys and values of masks, computed once for each span and used by every later one.

        Args:
            masks: `(n, 4G, 4G)` low-res logits.
            span_queries: `(n, C)` queries of the spans they belong to.
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
        """Keys and values `(n, T, G*G, C)` of T earlier masks each to dense prompts `(n, C, G, G)`."""
        rows, earlier, cells, width = keys.shape
        by_head = (rows, earlier, cells, self.num_heads, width // self.num_heads)
        queries = self.q_proj(self.queries).view(by_head[2:])  # (G*G, heads, C/heads)
        scores = (queries * keys.view(by_head)).sum(-1) / math.sqrt(by_head[-1])  # (n, T, G*G, heads)
        attended = (scores.softmax(dim=1)[..., None] * values.view(by_head)).sum(dim=1)
        dense = self.out_proj(attended.flatten(2))  # (n, G*G, C)
        grid = math.isqrt(cells)
        return dense.transpose(1, 2).unflatten(2, (grid, grid))


def decode_spans(tags: torch.LongTensor, answer_mask: torch.BoolTensor | None = None) -> torch.LongTensor:
    """
    Spans of BIO tags: a B and the I's directly after it; an I without an open span is ignored.

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
    """`ValueError` unless `spans` `(S, 3)` are `[row, start, end)` in B rows of L tokens, in order and not empty."""
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
            raise ValueError(f"{where}, which holds no token: its end must be after its start.")
        if (row, start) < previous:
            raise ValueError(
                f"{where}, after one that starts at {list(previous)}; spans must be sorted by row and start."
            )
        previous = (row, start)


def keep_last_answer(labels: torch.LongTensor) -> torch.LongTensor:
    """Labels (B, L) of the last answer of each row; earlier answers, which were given, become -100."""
    answered = labels != IGNORE_INDEX
    number = (answered & ~F.pad(answered, (1, 0))[:, :-1]).cumsum(dim=1)
    return labels.masked_fill(number < number[:, -1:], IGNORE_INDEX)


def mean_over_spans(states: torch.Tensor, spans: torch.LongTensor) -> torch.Tensor:
    """`(B, L, D)` token states to `(S, D)` means over the tokens of each span `[row, start, end)`."""
    rows, starts, ends = spans.unbind(dim=1)
    position = torch.arange(states.shape[1], device=states.device)
    inside = (position >= starts[:, None]) & (position < ends[:, None])  # (S, L)
    weights = inside / (ends - starts)[:, None]
    return torch.einsum("sl,sld->sd", weights.to(states.dtype), states[rows])
