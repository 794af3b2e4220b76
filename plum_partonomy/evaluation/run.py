"""Run an evaluation, from its options to the report; evaluate_plum.py and `plum eval` call `main`."""

from dataclasses import dataclass, field
from typing import Literal

from transformers import HfArgumentParser

from plum_partonomy.command_line import Options, check_writable, nearest
from plum_partonomy.masks import DataError

BASELINES = ("random", "majority", "full_image", "ground_truth")
"""The baselines of scoring/baselines.py, listed here to keep --help fast."""
MODEL_BASELINES = ("sam3", "vlm", "vlm+sam3")


@dataclass
class EvaluationArguments:
    """What to score, on which data, and how."""

    output_dir: str = field(metadata={"help": "Folder for predictions.jsonl, metrics.json and report.html."})
    model: str | None = field(default=None, metadata={"help": "Folder of a PLUM checkpoint, or its name on the Hub."})
    predictions: str | None = field(default=None, metadata={"help": "Instead: file with the answers of any model."})
    baseline: str | None = field(
        default=None,
        metadata={
            "help": "Instead: random, majority, full_image or ground_truth, which need no model; sam3, vlm or "
            "vlm+sam3; or a Python file with your own class Model."
        },
    )
    vlm: str | None = field(
        default=None,
        metadata={
            "help": "For --baseline vlm: folder or Hub name of a vision-language model of transformers; or the URL of "
            "an API such as http://localhost:8000/v1, which answers with letters of choices."
        },
    )
    choices_by: Literal["likelihood", "letter"] = field(
        default="likelihood", metadata={"help": "How --vlm chooses: by the likelihood of choices or of their letters."}
    )
    sam3: str | None = field(
        default=None, metadata={"help": "For --baseline sam3: folder or Hub name of a SAM 3 of transformers."}
    )
    sam3_prompt: Literal["part", "part_of_object"] = field(
        default="part", metadata={"help": 'Prompt of SAM 3: "left wing", or "left wing of the plane".'}
    )
    sam3_threshold: float = field(default=0.3, metadata={"help": "Minimum score of an instance of SAM 3."})
    format: Literal["jsonl", "official"] = field(
        default="jsonl", metadata={"help": "Format of --predictions; official is the json of the authors' scripts."}
    )
    on_error: Literal["refuse", "report"] | None = field(
        default=None,
        metadata={
            "help": "Unusable lines of --predictions and records of --data_dir: raise an error (refuse, the default) "
            "or skip them and write errors.jsonl (report). With an explicit refuse, masks of core that differ in size "
            "from their image are unusable as well; by default they are resized and counted."
        },
    )
    task: Literal[
        "partonomy",
        "correction",
        "referring",
        "reasoning",
        "instructed_parts",
        "generalized_referring",
        "semantic_parts",
        "gqa",
        "textvqa",
        "pope",
    ] = field(default="partonomy", metadata={"help": "Task; docs/benchmark.md lists the metrics of each."})
    dataset: str = field(default="partonomy", metadata={"help": "Data set, as in datasets.load_dataset."})
    name: str = field(default="mini_questions", metadata={"help": "Its configuration, with questions."})
    split: str = field(default="test", metadata={"help": "Its split."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of your files, if --name needs one."})
    scheme: Literal["official", "balanced"] | None = field(
        default=None, metadata={"help": "Distractor scheme of questions about --data_dir."}
    )
    control: Literal["wrong_image", "none"] = field(
        default="wrong_image", metadata={"help": "Repeat all questions with the image of another record, or not."}
    )
    choice_reduction: Literal["sequence_mean", "answer_mean", "answer_sum"] = field(
        default="sequence_mean",
        metadata={
            "help": "Log-likelihood of a choice: mean over prompt and answer, as published, or over the answer only."
        },
    )
    mask_source: Literal["gt_answer", "predicted_answer", "generated"] = field(
        default="gt_answer",
        metadata={
            "help": "Masks scored by gIoU, cIoU and AP50: those of the correct, the chosen or the generated answer."
        },
    )
    match: Literal["exact", "lemmatised", "embedding"] = field(
        default="exact", metadata={"help": "How part names of generated answers are compared."}
    )
    match_model: str | None = field(
        default=None,
        metadata={"help": "For --match embedding: folder or Hub name of a sentence-embedding model of transformers."},
    )
    max_new_tokens: int = field(default=96, metadata={"help": "Maximum length of a generated answer, in tokens."})
    batch_size: int = field(default=16, metadata={"help": "Questions per step."})
    image_cache_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of images whose features are kept in memory; default: 128 for PLUM, 8 for other models."
        },
    )
    limit: int | None = field(default=None, metadata={"help": "Only the first questions of the split."})
    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata={"help": "auto uses a GPU if there is one."}
    )
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "Precision of the weights."})
    cache_image_embeddings: str | None = field(
        default=None, metadata={"help": "Folder that caches the embeddings of SAM's encoder, in bfloat16."}
    )

    def __post_init__(self):
        if sum(source is not None for source in (self.model, self.predictions, self.baseline)) != 1:
            raise DataError("Expected one of --model, --predictions and --baseline: say what to score.")
        asked = self.baseline in (*BASELINES, *MODEL_BASELINES) or str(self.baseline).endswith(".py")
        if self.baseline is not None and not asked:
            known = ", ".join((*BASELINES, *MODEL_BASELINES))
            hint = nearest(self.baseline, (*BASELINES, *MODEL_BASELINES))
            raise DataError(f"--baseline {self.baseline}: expected one of {known}, or a Python file{hint or '.'}")
        if self.task == "correction" and self.model is None:
            raise DataError("--task correction gives a model true masks: pass --model.")
        if self.task != "partonomy" and (self.baseline is not None or self.format != "jsonl"):
            raise DataError(f"--task {self.task} scores a --model or --predictions of the format jsonl: give one.")
        if (self.match == "embedding") != (self.match_model is not None):
            raise DataError("--match embedding and --match_model belong together: give both or neither.")
        for name in ("max_new_tokens", "batch_size", "image_cache_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"--{name} must be at least 1, found {value}.")


class EvaluationOptions(Options, HfArgumentParser):
    """Parser of the options of an evaluation."""


def main(options: list[str] | None = None) -> None:
    """Run an evaluation from its command line. Raises DataError if it cannot be done."""
    parser = EvaluationOptions(EvaluationArguments, prog="evaluate_plum.py", allow_abbrev=False)
    (arguments,) = parser.parse_args_into_dataclasses(options, look_for_args_file=False)
    check_writable(arguments.output_dir)
    # These import torch and the readers, which take seconds that --help and a wrong option should not wait for.
    from plum_partonomy.evaluation.corrections import evaluate_correction
    from plum_partonomy.evaluation.partonomy import dataset_options, evaluate, evaluate_answers
    from plum_partonomy.evaluation.tasks import evaluate_task

    if arguments.task == "correction":
        evaluate_correction(arguments, **dataset_options(arguments))
    elif arguments.task != "partonomy":
        evaluate_task(arguments, **dataset_options(arguments))
    elif arguments.model is not None:
        evaluate(arguments)
    elif arguments.baseline is not None and arguments.baseline not in BASELINES:
        from plum_partonomy.baselines.open import open_baseline

        evaluate(arguments, open_baseline)
    else:
        evaluate_answers(arguments)
