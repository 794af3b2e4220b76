"""The checkpoints that the demonstration holds, and what is known of each: from its config and its card."""

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
    A model with what the page says of it.

    Args:
        name: Shown on the page, different for each checkpoint.
        parameters: Number of its parameters.
        kinds: Images that it has learnt, in words; None if its config does not say.
        figures: By data set the values of the main metrics in its card.
    """

    name: str
    plum: Plum
    parameters: int = 0
    kinds: str | None = None
    figures: dict[str, dict[str, float]] = field(default_factory=dict)


def load_checkpoints(names: Sequence[str | Path], *, device: str = "cpu") -> list[Checkpoint]:
    """Loads checkpoints, folders or names on the Hub.

    Raises:
        DataError: one cannot be loaded, or two have the same name.
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
    """The checkpoint with what its config and, if there is one, the card in its folder say of it."""
    statistics = plum.model.config.image_statistics or {}
    parameters = sum(tensor.numel() for tensor in plum.model.parameters())
    card = None if folder is None else folder / "README.md"
    figures = {} if card is None or not card.is_file() else read_figures(card)
    return Checkpoint(name, plum, parameters, statistics.get("kinds"), figures)


def read_figures(card: Path) -> dict[str, dict[str, float]]:
    """By data set the main metrics in a card; none if its head is not what the Hub expects."""
    try:
        results = ModelCard.load(card, ignore_metadata_errors=True).data.eval_results or []
    except (ValueError, OSError):
        return {}
    figures: dict[str, dict[str, float]] = {}
    for result in results:
        if result.metric_type in FIGURES:
            figures.setdefault(result.dataset_name, {})[FIGURES[result.metric_type]] = result.metric_value
    return figures
