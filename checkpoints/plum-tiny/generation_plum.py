"""
What one call of `generate` follows, and where the answers that it returns end.

Shapes. B rows, L tokens.
"""

import copy
import json

import torch
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file, logging

# Most tokens of an answer where neither a checkpoint nor a caller says another number; saved with every checkpoint.
DEFAULT_MAX_NEW_TOKENS = 256
# Ways of decoding that only save time or memory, and that embed several tokens by their ids alone: without the
# embeddings of the prompt and its image they fail or give another answer. Plain decoding gives the right one.
SAVINGS = ("assistant_model", "assistant_tokenizer", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp",
           "prefill_chunk_size")  # fmt: skip

logger = logging.get_logger(__name__)


def settle_options(
    defaults: GenerationConfig, options: dict, prompt_length: int
) -> tuple[GenerationConfig, dict[str, object]]:
    """
    The settings of one call, and those of its options that are none (inputs of the model, a streamer). What only saves
    time where it can be used is left out with a warning.

    Args:
        defaults: Settings of the model.
        options: Those of the call, over them; `generation_config` among them is overridden by single ones, and None
            stands for "not given".

    Raises:
        ValueError: Decoding by code of the caller's, `custom_generate`.
    """
    options = {name: value for name, value in options.items() if value is not None}
    given = options.pop("generation_config", None)
    given = {} if given is None else {name: value for name, value in given.to_dict().items() if value is not None}
    settings = copy.deepcopy(defaults)
    for changes in (given, options):
        if "max_length" in changes and "max_new_tokens" not in changes:
            changes = {**changes, "max_new_tokens": max(0, changes["max_length"] - prompt_length)}
        rest = settings.update(**changes)
    settings.max_length = None
    if settings.max_new_tokens is None:
        settings.max_new_tokens = DEFAULT_MAX_NEW_TOKENS
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


def stop_tokens(settings: GenerationConfig, device: torch.device) -> torch.LongTensor:
    """The tokens that end an answer, on the device of what they are compared with."""
    stop = settings.eos_token_id
    return torch.as_tensor([] if stop is None else stop, device=device, dtype=torch.long).flatten()


def find_ends(
    sequences: torch.LongTensor, prompt_mask: torch.Tensor, settings: GenerationConfig
) -> tuple[torch.Tensor, torch.BoolTensor, torch.BoolTensor]:
    """
    Where the answers of generated sequences `(B, L)` end, `prompt_mask` `(B, P)` being the prompts' attention mask.

    Returns:
        Attention mask `(B, L)`, up to and with the stop token; answer mask `(B, L)`, without it; and `(B,)`, whether
        an answer was cut off: neither a stop token nor a text that the caller named as `stop_strings` ended it.
    """
    answers = sequences[:, prompt_mask.shape[1] :]
    stops = torch.isin(answers, stop_tokens(settings, answers.device))
    if settings.pad_token_id is not None:
        # A row that ended otherwise is filled up with padding while others go on.
        stops = stops | ((answers != settings.pad_token_id).flip(1).cumsum(1).flip(1) == 0)
    before_or_at_stop = stops.cumsum(dim=1) - stops.int() == 0
    attention_mask = torch.cat([prompt_mask, before_or_at_stop.to(prompt_mask)], dim=1)
    answer_mask = torch.cat([torch.zeros_like(prompt_mask, dtype=torch.bool), before_or_at_stop & ~stops], dim=1)
    at_limit = not settings.stop_strings or answers.shape[1] >= settings.max_new_tokens
    return attention_mask, answer_mask, ~stops.any(dim=1) & at_limit


def check_generation_file(name: str, **hub_options) -> bool:
    """
    Whether a checkpoint has a generation config; `ValueError` if it is damaged: transformers would go on without it.

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
