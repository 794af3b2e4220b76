"""What the benchmarks of this folder share: two paths timed side by side, their results compared, a line of json."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def best_times(paths: list[Callable[[], Any]], *, rounds: int) -> list[float]:
    """Best time of each path in seconds; they take turns, so that what else the machine does meets all alike."""
    best = [float("inf")] * len(paths)
    for _ in range(rounds):
        for i, path in enumerate(paths):
            started = time.perf_counter()
            path()
            best[i] = min(best[i], time.perf_counter() - started)
    return best


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
    """Whether two nested results agree: tensors to a relative and absolute tolerance, all else exactly."""
    try:
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    except AssertionError as error:
        print(error, file=sys.stderr)
        return False
    return True


def compare(
    name: str,
    *,
    old: Callable[[], Any],
    new: Callable[[], Any],
    target: float,
    tolerance: float = 1e-4,
    rounds: int = 3,
    memory_target: float | None = None,
    **sizes,
) -> list[dict[str, Any]]:
    """
    Results of one claim, also printed as json: how many times as long the old path takes as the new one.

    Args:
        old, new: Return what must be equal; called without gradients unless they switch them on.
        target: Ratio that is aimed at.
        memory_target: Ratio of peak memory, new to old, that is aimed at; a result of its own.
        sizes: What was measured, for the detail.
    """
    with torch.no_grad():
        equal = is_close(new(), old(), tolerance=tolerance)
        old_seconds, new_seconds = best_times([old, new], rounds=rounds)
        old_bytes, new_bytes = peak_memory(old), peak_memory(new)
    detail = sizes | {
        "old_seconds": round(old_seconds, 4),
        "new_seconds": round(new_seconds, 4),
        "old_peak_mb": round(old_bytes / 2**20, 1),
        "new_peak_mb": round(new_bytes / 2**20, 1),
        "tolerance": tolerance,
        "threads": torch.get_num_threads(),
    }
    results = [result(name, old_seconds / new_seconds, target, equal=equal, detail=detail)]
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
