"""
What PLUM adds to the generation of transformers: hidden states without another pass, settings, ends of answers; and
observers of the language model's passes.

Shapes. B rows, L tokens, D language width.
"""

import copy
import json
from contextvars import ContextVar

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.utils import GENERATION_CONFIG_NAME, cached_file, logging

try:
    from .inputs_plum import check_number
except ImportError:
    if __package__:
        raise
    from inputs_plum import check_number

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
        ValueError: A number is out of range, or the caller passes its own decoding code, `custom_generate`, or changes
            the prompt, `token_healing`.
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
    if settings.token_healing:
        raise ValueError("token_healing is not supported: it takes the image out of the prompt; leave it out.")
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
