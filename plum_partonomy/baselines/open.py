"""Load models under test by name: `--baseline sam3`, `vlm`, `vlm+sam3`, or your own file."""

import importlib.util
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from plum_partonomy.baselines.combined import Combined
from plum_partonomy.baselines.model import IMAGES_KEPT, Asker, UnderTest
from plum_partonomy.baselines.sam3 import Sam3
from plum_partonomy.baselines.served import ServedVlm
from plum_partonomy.baselines.vlm import Vlm
from plum_partonomy.masks import DataError
from plum_partonomy.records import Question
from plum_partonomy.scoring.results import fingerprint_files, fingerprint_model

__all__ = ["open_baseline"]


def open_baseline(arguments: Any, questions: Sequence[Question], device: torch.device) -> UnderTest:
    """Load the model of `--baseline`. Raises DataError if it cannot be loaded.

    Args:
        arguments: Arguments of evaluate_plum.py.
        questions: The questions; the names of their parts are recognised in plain answers.
        device: Device of its weights.
    """
    name = arguments.baseline
    settings: dict[str, Any] = {"baseline": name}
    if name.endswith(".py"):
        model = _load_own(Path(name))
        settings["baseline_fingerprint"] = fingerprint_files([Path(name)])
    else:
        loaded = {}
        if "vlm" in name:
            loaded["vlm"], settings["vlm"] = _load_vlm(arguments, device)
        if "sam3" in name:
            loaded["sam3"], settings["sam3"] = _load_sam3(arguments, device)
        model = Combined(loaded["vlm"], loaded["sam3"]) if len(loaded) == 2 else next(iter(loaded.values()))
    known = sorted({mask.label for question in questions for mask in question.masks})
    asker = Asker(
        model,
        mask_source=arguments.mask_source,
        known_parts=known,
        image_cache_size=arguments.image_cache_size or IMAGES_KEPT,
    )
    return UnderTest(asker, settings, choice_reduction=_reduction(arguments, model))


def _reduction(arguments: Any, model: Any) -> str:
    """Return how a choice is scored, for metrics.json."""
    speaker = getattr(model, "speaker", model)
    if isinstance(speaker, Vlm) and speaker.choices_by == "likelihood":
        return arguments.choice_reduction
    return "letter" if isinstance(speaker, (Vlm, ServedVlm)) else "as given"


def _load_vlm(arguments: Any, device: torch.device) -> tuple[Any, dict[str, Any]]:
    if arguments.vlm is None:
        raise DataError(f"--baseline {arguments.baseline} needs --vlm: a folder, a name on the Hub or a URL.")
    if not arguments.loads_vlm:
        served = ServedVlm(arguments.vlm, max_new_tokens=arguments.max_new_tokens)
        return served, {"name": served.model, "choices_by": "letter"}
    options = {"reduction": arguments.choice_reduction, "choices_by": arguments.choices_by}
    options["max_new_tokens"] = arguments.max_new_tokens
    vlm = Vlm.from_pretrained(arguments.vlm, dtype=getattr(torch, arguments.dtype), device=device, **options)
    return vlm, {**_identity(arguments.vlm, vlm.model), "choices_by": arguments.choices_by}


def _load_sam3(arguments: Any, device: torch.device) -> tuple[Sam3, dict[str, Any]]:
    if arguments.sam3 is None:
        raise DataError(f"--baseline {arguments.baseline} needs --sam3: a folder or a name on the Hub.")
    options = {"threshold": arguments.sam3_threshold, "prompt": arguments.sam3_prompt}
    sam3 = Sam3.from_pretrained(arguments.sam3, dtype=getattr(torch, arguments.dtype), device=device, **options)
    return sam3, {**_identity(arguments.sam3, sam3.model), **options}


def _identity(name: str, model: Any) -> dict[str, Any]:
    """Return the identity of the weights: files of a folder, or a commit on the Hub."""
    if Path(name).is_dir():
        return {"name": name, "fingerprint": fingerprint_model(Path(name))}
    return {"name": name, "revision": getattr(model.config, "_commit_hash", None)}


def _load_own(path: Path) -> Any:
    """Return an object of the class `Model` of a Python file."""
    if not path.is_file():
        raise DataError(f"--baseline {path}: there is no such file; expected one with a class Model.")
    spec = importlib.util.spec_from_file_location("model_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kind = getattr(module, "Model", None)
    if not inspect.isclass(kind):
        raise DataError(f"{path}: expected a class Model, made without arguments; docs/benchmark.md has an example.")
    return kind()
