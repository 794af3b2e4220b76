"""Measure steps on a device against their floor, for perf/gpu.py."""

import dataclasses
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from breakdown import Breakdown, list_kernels, take_apart
from measure import result
from torch.utils.flop_counter import FlopCounterMode

TOLERANCE = 0.1


def run_step(step: Callable[[], torch.Tensor], device: str) -> tuple[torch.Tensor, float, float | None, float]:
    """
    Return the result of a step, its best time in seconds, its peak memory in GiB, weights included, and the seconds of
    its first run, in which libraries choose their kernels and modules are compiled.
    """
    on_gpu, seconds = device == "cuda", []
    started = time.perf_counter()
    outputs = step().clone()
    first = time.perf_counter() - started
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3 if on_gpu else 1):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return outputs, min(seconds), round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None, first


def count_flops(step: Callable[[], torch.Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Card:
    """
    The device, and what it reaches.

    Attributes:
        peak_tflops: TFLOP/s of bfloat16 matrix products.
        peak_tbytes: TB/s of reading its memory.
    """

    device: str
    peak_tflops: float
    peak_tbytes: float

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.device == "cuda" else "cpu"

    def floor(self, flops: int, bytes_read: int) -> float:
        """Return the seconds of so many operations and of reading so many bytes, one after the other."""
        return flops / (self.peak_tflops * 1e12) + bytes_read / (self.peak_tbytes * 1e12)


@contextmanager
def attempt(name: str) -> Iterator[None]:
    """Print one line of JSON if the block fails, and continue; release the memory of the device."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        print(json.dumps({"name": name, "failed": f"{type(error).__name__}: {reason}"}), flush=True)
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def measure(
    name: str,
    card: Card,
    *,
    old: Callable[[], torch.Tensor],
    new: Callable[[], torch.Tensor],
    flops: int | None = None,
    bytes_read: int = 0,
    breakdown: Breakdown | None = None,
    target: float | None = None,
) -> None:
    """
    Print a line of JSON: the ratio of the times of two methods for the same tensor.

    Args:
        old, new: The methods.
        flops: Operations of the model, for the floor; None for no floor.
        bytes_read: Bytes of weights that are read again for each token.
        breakdown: Splits the new method by component; None for compiled modules, which it would change.
        target: Target ratio.
    """
    found, seconds, peak, first = run_step(new, card.device)
    expected, old_seconds, old_peak, _ = run_step(old, card.device)
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    detail = {
        "old_seconds": round(old_seconds, 4),
        "new_seconds": round(seconds, 4),
        "first_seconds": round(first, 2),
        "old_peak_gib": old_peak,
        "new_peak_gib": peak,
        "relative_error": round(error, 4),
    }
    if flops is not None:
        floor = card.floor(flops, bytes_read)
        detail |= {
            "tera_flops": round(flops / 1e12, 3),
            "giga_bytes_read": round(bytes_read / 1e9, 3),
            "floor_seconds": round(floor, 4),
            "times_the_floor": round(seconds / floor, 2),
        }
    detail["breakdown"] = list_kernels(new, card.device) if breakdown is None else take_apart(new, breakdown)
    detail |= {**dataclasses.asdict(card), "device": card.name}
    result(name, old_seconds / seconds, target, equal=error < TOLERANCE, detail=detail)


def measure_alone(name: str, card: Card, step: Callable[[], torch.Tensor], **detail) -> None:
    """Print a line of JSON: how often a second the step runs, and its peak memory."""
    _, seconds, peak, _ = run_step(step, card.device)
    detail |= {"seconds": round(seconds, 4), "peak_gib": peak, "device": card.name}
    result(name, 1 / seconds, None, equal=True, detail=detail)
