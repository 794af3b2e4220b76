"""
Passes of a language model that are not made twice: over what rows have in common, and over what was just generated.

The answers to a question share its image and its words, the questions about an image share the image. Such rows form
trees whose nodes are tokens; a tree is laid out in one packed row, in which a token attends to its ancestors alone and
keeps the position that it has in its own row:

    rows      I I I q q a a       packed     I I I q q a a b q c     (b: another answer to q q, c: to another question)
              I I I q q b         attends    b to I I I q q b and to nothing else
              I I I q c

The hidden states are those of separate passes (float32: to 1e-5). The vision-language model's own code still makes the
embeddings and positions of the whole rows, and only what it hands to its language model is packed, so that no family
is named here. The states of a generated answer are kept while it is generated; its last token alone, which generation
does not read, takes one more step.

Shapes. B rows, L tokens, T trees, P tokens of a packed row, D language width.
"""

from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

# A packed row takes in no further rows beyond so many tokens: its attention costs their square.
PACKED_TOKENS = 2048


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


def is_plain(inputs: dict) -> bool:
    """Whether a language model's inputs are embeddings, positions and padding, a cache and nothing further."""
    tensors = {name for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    others = {name for name, value in inputs.items() if isinstance(value, (list, tuple, dict)) and value}
    mask = inputs.get("attention_mask")
    return (
        "inputs_embeds" in tensors
        and tensors <= {"inputs_embeds", "attention_mask", "position_ids"}
        and not others
        and (mask is None or mask.ndim == 2)
    )


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


class Observer:
    """
    What one call wants to see or change of the passes of a language model, while it lasts and in its own thread. The
    hooks that ask for it are put on the module once, by [`let_observe`], and keep nothing: calls in other threads go
    through the same module and see nothing of it.
    """

    def __init__(self, decoder: nn.Module):
        self.decoder = decoder

    def __enter__(self):
        self._token = _OBSERVER.set(self)
        return self

    def __exit__(self, *error):
        _OBSERVER.reset(self._token)

    def before(self, args: tuple, inputs: dict) -> tuple[tuple, dict] | None:
        """Other arguments for a pass, or None."""

    def after(self, inputs: dict, outputs):
        """Other outputs of a pass, or None."""


_OBSERVER: ContextVar[Observer | None] = ContextVar("plum_observer", default=None)


def _before_pass(decoder: nn.Module, args: tuple, inputs: dict):
    observer = _OBSERVER.get()
    return observer.before(args, inputs) if observer is not None and observer.decoder is decoder else None


def _after_pass(decoder: nn.Module, args: tuple, inputs: dict, outputs):
    observer = _OBSERVER.get()
    return observer.after(inputs, outputs) if observer is not None and observer.decoder is decoder else None


def let_observe(decoder: nn.Module):
    """Puts the hooks on a language model that [`Observer`] needs; called once, when the model is made."""
    decoder.register_forward_pre_hook(_before_pass, with_kwargs=True)
    decoder.register_forward_hook(_after_pass, with_kwargs=True)


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


class GeneratedStates(Observer):
    """
    Hidden states of the prompts and answers of one call of `generate`, as a context manager around it.

    A decoder whose steps are not one token of every row each (beams, chunked generation), that takes more than
    embeddings and positions, or whose cache has no room for a further token must read the sequences again.
    """

    def __init__(self, decoder: nn.Module):
        super().__init__(decoder)
        self.states: list[torch.Tensor] = []
        self.inputs: dict = {}

    def after(self, inputs, outputs):
        self.inputs = inputs
        self.states.append(outputs.last_hidden_state)

    @torch.no_grad()
    def finish(self, sequences: torch.LongTensor) -> torch.Tensor | None:
        """Hidden states `(B, L, D)` of the generated sequences; `None` if they must be read again."""
        rows, length = sequences.shape
        steps = {tuple(states.shape[:2]) for states in self.states[1:]}
        whole = sum(states.shape[1] for states in self.states) == length - 1
        if not (whole and len(self.states[0]) == rows and steps <= {(rows, 1)} and is_plain(self.inputs)):
            return None
        inputs = dict(self.inputs)
        if type(inputs.get("past_key_values")) is not DynamicCache or not inputs.get("use_cache", True):
            return None
        inputs["inputs_embeds"] = self.decoder.get_input_embeddings()(sequences[:, -1:])
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"][..., -1:] + 1
        if inputs.get("attention_mask") is not None:
            inputs["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        return torch.cat([*self.states, self.decoder(**inputs).last_hidden_state], dim=1)


class RecordedInputs(Observer):
    """The keyword arguments of the language model's next pass, in the dictionary `inputs`."""

    def __init__(self, decoder: nn.Module):
        super().__init__(decoder)
        self.inputs: dict = {}

    def before(self, args, inputs):
        self.inputs.update(inputs)
