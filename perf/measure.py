"""What the benchmarks of this folder share: two paths timed side by side, their results compared, a line of json."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent


def take_turns(paths: list[Callable[[], Any]], *, rounds: int) -> tuple[list[Any], list[float]]:
    """First result and best time in seconds of each path; turn by turn, so that other load meets all of them alike."""
    results, best = [None] * len(paths), [float("inf")] * len(paths)
    for turn in range(rounds):
        for i, path in enumerate(paths):
            started = time.perf_counter()
            outputs = path()
            best[i] = min(best[i], time.perf_counter() - started)
            if turn == 0:
                results[i] = outputs
    return results, best


def peak_memory(path: Callable[[], Any]) -> int:
    """Most bytes that tensors made by the path took at once on the CPU; weights and inputs are not among them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        path()
    held = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def is_close(found: Any, expected: Any, *, tolerance: float) -> bool:
    """
    Whether two nested results agree: numbers to a relative and absolute tolerance, masks but for a pixel in a thousand
    (a logit of next to nothing has no certain sign), all else exactly.
    """
    if isinstance(expected, dict):
        found, expected = (list(part.items()) for part in (found, expected))
    if isinstance(expected, (list, tuple)):
        pairs = zip(found, expected, strict=True)
        return len(found) == len(expected) and all(is_close(*pair, tolerance=tolerance) for pair in pairs)
    if not isinstance(expected, torch.Tensor):
        return found == expected
    if expected.dtype == torch.bool:
        return found.shape == expected.shape and (found != expected).float().mean().item() < 1e-3
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def compare(
    name: str,
    *,
    old: Callable[[], Any],
    new: Callable[[], Any],
    target: float,
    better: str = "higher",
    tolerance: float = 1e-4,
    rounds: int = 3,
    old_part: Callable[[], Any] | None = None,
    memory_target: float | None = None,
    **sizes,
) -> list[dict[str, Any]]:
    """
    Results of one claim, also printed as json.

    Args:
        old, new: Return what must be equal.
        target: Ratio that is aimed at: old to new time where higher is better, else new to old.
        old_part: As much of the old path as shows its peak memory, where all of it takes long.
        memory_target: Ratio of peak memory, new to old, that is aimed at; a result of its own.
        sizes: What was measured, for the detail.
    """
    (expected, found), (old_seconds, new_seconds) = take_turns([old, new], rounds=rounds)
    equal = is_close(found, expected, tolerance=tolerance)
    old_bytes, new_bytes = peak_memory(old_part or old), peak_memory(new)
    detail = sizes | {
        "old_seconds": round(old_seconds, 4),
        "new_seconds": round(new_seconds, 4),
        "old_peak_mb": round(old_bytes / 2**20, 1),
        "new_peak_mb": round(new_bytes / 2**20, 1),
        "tolerance": tolerance,
        "threads": torch.get_num_threads(),
    }
    ratio = old_seconds / new_seconds if better == "higher" else new_seconds / old_seconds
    results = [result(name, ratio, target, better=better, equal=equal, detail=detail)]
    if memory_target is not None:
        memory = new_bytes / old_bytes
        results.append(
            result(f"{name}, peak memory", memory, memory_target, better="lower", equal=equal, detail=detail)
        )
    return results


def result(
    name: str, ratio: float, target: float | None, *, equal: bool, detail: dict[str, Any], better: str = "higher"
) -> dict[str, Any]:
    """A line of results.json, also printed."""
    line = {
        "name": name,
        "ratio": round(ratio, 3),
        "target": target,
        "better": better,
        "equal": equal,
        "detail": detail,
    }
    print(json.dumps(line), flush=True)
    return line
