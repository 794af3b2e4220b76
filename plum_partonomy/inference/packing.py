"""
Conversations read by the language model with what they have in common read once.

The answers to a question share its image and its words, the questions about an image share the image. Such rows form
trees whose nodes are tokens; a tree is laid out in one packed row, in which a token attends to its ancestors alone and
keeps the position that it has in its own row:

    rows      I I I q q a a       packed     I I I q q a a b q c     (b: another answer to q q, c: to another question)
              I I I q q b         attends    b to I I I q q b and to nothing else
              I I I q c

The hidden states are those of separate passes (float32: to 1e-5). The vision-language model's own code still makes the
embeddings and positions of the whole rows, and only what it hands to its language model is packed, so that no family
is named here.

Shapes. B rows, L tokens, T trees, P tokens of a packed row, D language width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from modules_plum import Observer, is_plain

# A packed row takes in no further rows beyond so many tokens: its attention costs their square.
PACKED_TOKENS = 2048


def encode_conversations(
    model: nn.Module, input_ids: torch.LongTensor, attention_mask: torch.Tensor, **inputs
) -> torch.FloatTensor:
    """
    Return what `model.encode_conversations` returns, hidden states `(B, L, D)`, with the beginnings that rows about
    one image share computed once. Language models that take more than embeddings and positions, or look at a part of
    the sequence only, compute each row whole.

    Args:
        model: A `PlumForConditionalGeneration`.
        input_ids, attention_mask: `(B, L)`.
        inputs: As of `model.encode_conversations`; only rows with a `sam_image_index` share their image.
    """
    images = inputs.get("sam_image_index")
    images = torch.full((len(input_ids),), -1, device=input_ids.device) if images is None else images
    # A row whose image is not known shares with none, and rows without an image with each other.
    has_image = (input_ids == model.config.vlm_config.image_token_id).any(dim=1)
    unknown = torch.arange(len(input_ids), device=input_ids.device) - 1 - len(input_ids)
    roots = torch.where(has_image & (images < 0), unknown, images)
    with SharedBeginnings(model.vlm.get_decoder(), pack_rows(input_ids, attention_mask, roots.tolist())):
        return model.encode_conversations(input_ids, attention_mask, **inputs)


@dataclass
class PackedRows:
    """
    Where the tokens of rows stand in packed rows.

    Args:
        tree (`(B,)`), slot (`(B, L)`): The packed row of each row, and the place of each token in it (0 for padding).
        source (`(T, P)`): Index into the `B * L` tokens of one that stands at each place.
        depth (`(T, P)`): Tokens before it in its own row.
        visible (`(T, P, P)`): Whether the token at the first place attends to that at the second.
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
    Lays rows out in trees of tokens.

    Args:
        input_ids, attention_mask: `(B, L)`, padded on either side.
        roots: Rows with the same number may share a beginning; those with the same image do.
        max_tokens: A packed row of more tokens takes in no further rows.
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
    """Whether a language model can be given packed rows: plain inputs, full attention that takes any mask."""
    config = config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = layer_types != {"full_attention"} or (
        not hasattr(config, "layer_types") and getattr(config, "sliding_window", None) is not None
    )
    return (
        is_plain(inputs)
        and inputs.get("past_key_values") is None
        and not windows
        and config._attn_implementation in ("sdpa", "eager")
    )


class SharedBeginnings(Observer):
    """
    While it lasts, the language model computes rows packed, where [`can_pack`] allows it, and as they are elsewhere.
    """

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
