"""The processes and the device of an evaluation."""

from typing import Any

import torch
from accelerate import PartialState

from plum_partonomy.masks import DataError


def open_state(arguments: Any) -> PartialState:
    """
    Return the processes and the device of a run.

    Args:
        arguments: Arguments of evaluate_plum.py.

    Raises:
        DataError: There is no GPU for `--device cuda`, or a task that runs in one process has several.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda needs a GPU, found none: use auto or cpu.")
    # Without this setting and without a GPU, accelerate would start separate processes that do not know of each other.
    state = PartialState(cpu=arguments.device == "cpu" or not torch.cuda.is_available())
    if state.num_processes > 1 and not arguments.is_partonomy:
        raise DataError(f"--task {arguments.task} runs in one process: start it with python.")
    return state
