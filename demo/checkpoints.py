"""The checkpoints of the app, with descriptions from their configs and cards."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard

from plum_partonomy.inference.one_image import Plum, load_model
from plum_partonomy.masks import DataError

FIGURES = {"choice_accuracy": "choice accuracy", "end_to_end_giou": "gIoU of its own answers"}


@dataclass(frozen=True)
class Checkpoint:
    """
    A model with its description on the page.

    Args:
        name: Unique name on the page.
        parameters: Number of parameters.
        kinds: Kinds of its training images in words; None if its config does not have them.
        figures: Data set -> values of the main metrics in its card.
    """

    name: str
    plum: Plum
    parameters: int = 0
    kinds: str | None = None
    figures: dict[str, dict[str, float]] = field(default_factory=dict)


def load_checkpoints(names: Sequence[str | Path], *, device: str = "cpu") -> list[Checkpoint]:
    """Load checkpoints, given as folders or names on the Hub.

    Raises:
        DataError: One cannot be loaded, or two have the same name.
    """
    found: list[Checkpoint] = []
    for name in names:
        folder, plum = load_model(name, device=device)
        short = Path(str(name)).resolve().name if Path(str(name)).exists() else str(name)
        if short in [other.name for other in found]:
            raise DataError(f"Expected checkpoints of different names, found {short!r} twice: rename one folder.")
        found.append(describe(short, plum, folder))
    return found


def describe(name: str, plum: Plum, folder: Path | None = None) -> Checkpoint:
    """Return the checkpoint with its description from the config and, if there is one, the card in its folder."""
    statistics = plum.model.config.image_statistics or {}
    parameters = sum(tensor.numel() for tensor in plum.model.parameters())
    card = None if folder is None else folder / "README.md"
    figures = {} if card is None or not card.is_file() else read_figures(card)
    return Checkpoint(name, plum, parameters, statistics.get("kinds"), figures)


def read_figures(card: Path) -> dict[str, dict[str, float]]:
    """Return the main metrics in a card by data set; empty if its metadata is not as the Hub expects."""
    try:
        results = ModelCard.load(card, ignore_metadata_errors=True).data.eval_results or []
    except (ValueError, OSError):
        return {}
    figures: dict[str, dict[str, float]] = {}
    for result in results:
        if result.metric_type in FIGURES:
            figures.setdefault(result.dataset_name, {})[FIGURES[result.metric_type]] = result.metric_value
    return figures
