"""
Run the language model on conversations with common prefixes computed once.

The answers to a question share its image and words, and the questions about an image share the image. Such rows form
trees of tokens. A tree is laid out in one packed row, in which a token attends only to its ancestors and keeps the
position of its own row:

    rows      I I I q q a a       packed     I I I q q a a b q c     (b: another answer to q q, c: to another question)
              I I I q q b         attends    b to I I I q q b and to nothing else
              I I I q c

The hidden states equal those of separate passes (float32: to 1e-5). The code of the vision-language model computes the
embeddings and positions of the whole rows, and only the input of its language model is packed, so no code here depends
on the model family.

Shapes. B rows, L tokens, T trees, P tokens of a packed row, D language width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from generation_plum import Observer, is_plain

# Maximum tokens of a packed row before it takes no further rows; attention grows with the square.
PACKED_TOKENS = 2048


def encode_conversations(
    model: nn.Module, input_ids: torch.LongTensor, attention_mask: torch.Tensor, **inputs
) -> torch.FloatTensor:
    """
    Return the hidden states `(B, L, D)` of `model.encode_conversations`, with shared prefixes of rows about one image
    computed once. Language models that take more than embeddings and positions, or use partial attention, compute
    each row separately.

    Args:
        model: A `PlumForConditionalGeneration`.
        input_ids, attention_mask: `(B, L)`.
        inputs: As in `model.encode_conversations`; only rows with a `sam_image_index` share their image.
    """
    images = inputs.get("sam_image_index")
    images = torch.full((len(input_ids),), -1, device=input_ids.device) if images is None else images
    # A row with an unknown image shares with none; rows without an image share with each other.
    has_image = (input_ids == model.config.vlm_config.image_token_id).any(dim=1)
    unknown = torch.arange(len(input_ids), device=input_ids.device) - 1 - len(input_ids)
    roots = torch.where(has_image & (images < 0), unknown, images)
    with SharedBeginnings(model.get_decoder(), pack_rows(input_ids, attention_mask, roots.tolist())):
        return model.encode_conversations(input_ids, attention_mask, **inputs)


@dataclass
class PackedRows:
    """
    Position of each row's tokens in the packed rows.

    Args:
        tree (`(B,)`), slot (`(B, L)`): Packed row of each row, and position of each token in it (0 for padding).
        source (`(T, P)`): Index of a token at each position, into the `B * L` tokens.
        depth (`(T, P)`): Number of tokens before it in its own row.
        visible (`(T, P, P)`): Whether the token at the first position attends to the one at the second.
    """

    tree: torch.LongTensor
    slot: torch.LongTensor
    source: torch.LongTensor
    depth: torch.LongTensor
    visible: torch.BoolTensor


def pack_rows(
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor,
    roots: list[int],
    max_tokens: int = PACKED_TOKENS,
) -> PackedRows:
    """
    Lay out rows as trees of tokens.

    Args:
        input_ids, attention_mask: `(B, L)`, padded on either side.
        roots: Rows with the same number may share a prefix; rows about one image have the same number.
        max_tokens: A packed row with more tokens takes no further rows.
    """
    (rows, length), ids = input_ids.shape, input_ids.tolist()
    real = [mask.nonzero()[:, 0].tolist() for mask in attention_mask.cpu()]
    trees: list[list[tuple[int, int, int]]] = []  # of each token: parent, depth, source
    open_trees: dict[int, tuple[int, dict]] = {}  # by root: the tree and its token by (parent, id)
    tree, slot = torch.zeros(rows, dtype=torch.long), np.zeros((rows, length), dtype=np.int64)
    for row in range(rows):
        number, children = open_trees.get(roots[row], (-1, {}))
        if number < 0 or len(trees[number]) >= max_tokens:
            number, children = len(trees), {}
            trees.append([])
            open_trees[roots[row]] = (number, children)
        tree[row], parent = number, -1
        for depth, position in enumerate(real[row]):
            key = (parent, ids[row][position])
            if key not in children:
                children[key] = len(trees[number])
                trees[number].append((parent, depth, row * length + position))
            parent = slot[row, position] = children[key]

    packed_length = max(map(len, trees))
    source, depths = np.zeros((2, len(trees), packed_length), dtype=np.int64)
    visible = np.zeros((len(trees), packed_length, packed_length), dtype=bool)
    visible[:, range(packed_length), range(packed_length)] = True
    for number, tokens in enumerate(trees):
        for place, (parent, depth, of_row) in enumerate(tokens):
            source[number, place], depths[number, place] = of_row, depth
            if parent >= 0:
                visible[number, place, : parent + 1] = visible[number, parent, : parent + 1]
    device = input_ids.device
    return PackedRows(*(part.to(device) for part in (tree, *map(torch.from_numpy, (slot, source, depths, visible)))))


def can_pack(inputs: dict, config) -> bool:
    """Return whether a language model accepts packed rows: plain inputs, full attention with any mask."""
    config, mask = config.get_text_config(), inputs.get("attention_mask")
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = layer_types != {"full_attention"} or (
        not hasattr(config, "layer_types") and getattr(config, "sliding_window", None) is not None
    )
    return (
        is_plain(inputs)
        and (mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2))
        and inputs.get("past_key_values") is None
        and not windows
        and config._attn_implementation in ("sdpa", "eager")
    )


class SharedBeginnings(Observer):
    """Context in which the language model computes packed rows if [`can_pack`] allows it, else the given rows."""

    def __init__(self, decoder: nn.Module, packed: PackedRows):
        super().__init__(decoder)
        self.packed, self.is_packed = packed, False

    def before(self, args, inputs):
        self.is_packed = not args and can_pack(inputs, self.decoder.config)
        if not self.is_packed:
            return None
        packed, embeddings = self.packed, inputs["inputs_embeds"]
        positions = packed.depth
        if inputs.get("position_ids") is not None:
            given = inputs["position_ids"]
            given = given.expand(*given.shape[:-2], *embeddings.shape[:2]).flatten(-2)  # (..., B * L)
            positions = given[..., packed.source]
        mask = torch.zeros(packed.visible.shape, dtype=embeddings.dtype, device=embeddings.device)
        mask.masked_fill_(~packed.visible, torch.finfo(embeddings.dtype).min)
        return args, inputs | {
            "inputs_embeds": embeddings.flatten(0, 1)[packed.source],
            "attention_mask": mask[:, None],  # (T, 1, P, P)
            "position_ids": positions,
        }

    def after(self, inputs, outputs):
        if self.is_packed:
            outputs.last_hidden_state = outputs.last_hidden_state[self.packed.tree[:, None], self.packed.slot]
        return outputs
