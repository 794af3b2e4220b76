"""Split the time of a step of PLUM by component, for perf/gpu.py."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import modeling_plum
from modeling_plum import PlumForConditionalGeneration

LOSSES = ("language_modeling_loss", "span_tagging_loss", "mask_losses", "teacher_kl_loss")


class Breakdown:
    """
    Seconds of each component of a model: on a GPU the time between two events of its stream, which includes the
    gaps between kernels; on a CPU elapsed time. A component within another one counts only once, as the inner one. The
    same names are ranges of the profiler.
    """

    def __init__(self, model: PlumForConditionalGeneration, device: str):
        self.model, self.on_gpu = model, device == "cuda"
        self._marks: list[tuple[str, str | None, Any, Any]] = []  # name, name of the outer component, start, end
        self._open: list[str] = []

    def _mark(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the block as a component."""
        started, outer = self._mark(), self._open[-1] if self._open else None
        self._open.append(name)
        with record_function(name):
            yield
        self._open.pop()
        self._marks.append((name, outer, started, self._mark()))

    def timed(self, name: str | Callable[[dict], str], function: Callable) -> Callable:
        """Return the function as a component; `name` may depend on its keyword arguments."""

        @wraps(function)
        def run(*args, **inputs):
            with self.part(name if isinstance(name, str) else name(inputs)):
                return function(*args, **inputs)

        return run

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Count the components of the model within the block."""
        model, vlm = self.model, self.model.vlm
        modules = [("SAM encoder", model.sam.vision_encoder), ("tagger", model.span_tagger)]
        modules += [(_name_of_pass, vlm.get_decoder()), ("head", vlm.get_output_embeddings())]
        modules += [("vision tower", vlm.model.vision_tower), ("projector", vlm.model.multi_modal_projector)]
        patches = [patch.object(module, "forward", self.timed(name, module.forward)) for name, module in modules]
        patches.append(patch.object(model, "decode_masks", self.timed("mask decoder", model.decode_masks)))
        for name in LOSSES:
            function = getattr(modeling_plum.modules, name)
            patches.append(patch.object(modeling_plum.modules, name, self.timed("loss", function)))
        for each in patches:
            each.start()
        try:
            yield
        finally:
            for each in patches:
                each.stop()

    def seconds(self) -> dict[str, float]:
        """Return the total seconds of each component since the last call."""
        if self.on_gpu:
            torch.cuda.synchronize()
        totals: dict[str, float] = defaultdict(float)
        for name, outer, started, ended in self._marks:
            seconds = started.elapsed_time(ended) / 1000 if self.on_gpu else ended - started
            totals[name] += seconds
            if outer is not None:
                totals[outer] -= seconds
        self._marks.clear()
        return dict(totals)


def _name_of_pass(inputs: dict) -> str:
    """Return whether the language model is trained, reads the tokens of a row or writes the next one."""
    if torch.is_grad_enabled():
        return "language model"
    return "decoding" if inputs["inputs_embeds"].shape[1] == 1 else "prefill"


def take_apart(step: Callable[[], Any], breakdown: Breakdown) -> dict[str, Any]:
    """
    Return where the time of a step goes: seconds by component and in total, and on a GPU the seconds in which the
    profiler saw a kernel run. The rest of the total is gaps, in which the card waits for launches.
    """
    with breakdown.recording():
        step()
        breakdown.seconds()
        with breakdown.part("other"):
            step()
    seconds = breakdown.seconds()
    found: dict[str, Any] = {"seconds": round(sum(seconds.values()), 4)}
    found["parts"] = {name: round(value, 4) for name, value in seconds.items()}
    return found | list_kernels(step, "cuda" if breakdown.on_gpu else "cpu")


def list_kernels(step: Callable[[], Any], device: str) -> dict[str, Any]:
    """Return the seconds in which the profiler sees a kernel of the step run on a GPU, and the longest kernels."""
    if device != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    kernels = sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)
    kernels = [event for event in kernels if event.device_type.name == "CUDA" and not event.is_user_annotation]
    return {
        "kernel_seconds": round(sum(event.self_device_time_total for event in kernels) / 1e6, 4),
        "kernels": {event.key[:60]: round(event.self_device_time_total / 1e6, 4) for event in kernels[:8]},
    }
