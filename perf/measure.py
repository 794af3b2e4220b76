"""Time two paths side by side, compare their results and print a line of JSON, for the benchmarks of this folder."""

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent


def take_turns(paths: list[Callable[[], Any]], *, rounds: int) -> tuple[list[Any], list[float]]:
    """Return the first result and best time in seconds of each path, run by turns so that other load affects all."""
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
    """Return the peak bytes of tensors created by the path on the CPU, without weights and inputs."""
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
    Return whether two nested results agree: numbers within a relative and absolute tolerance, masks except for one
    pixel in a thousand (a logit near zero has no certain sign), everything else exactly.
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
    Return the results of one comparison, also printed as JSON.

    Args:
        old, new: Functions whose results must be equal.
        target: Target ratio: old to new time if higher is better, else new to old.
        old_part: A shorter part of the old path with the same peak memory.
        memory_target: Target ratio of peak memory, new to old; a separate result.
        sizes: Sizes of the measurement, for the detail.
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


def cpu_name() -> str:
    """Return the name of this machine's CPU, as far as the system has one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def result(
    name: str, ratio: float, target: float | None, *, equal: bool, detail: dict[str, Any], better: str = "higher"
) -> dict[str, Any]:
    """Return a line of results.json, also printed; its device is `detail["device"]`, by default the CPU."""
    line = {
        "name": name,
        "device": detail.get("device") or cpu_name(),
        "ratio": round(ratio, 3),
        "target": target,
        "better": better,
        "equal": equal,
        "detail": {name: value for name, value in detail.items() if name != "device"},
    }
    print(json.dumps(line), flush=True)
    return line
