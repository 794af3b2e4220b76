"""Options of an evaluation, grouped by the runs that use them. An option that a run does not use raises an error."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from transformers import HfArgumentParser

from plum_partonomy.command_line import Options, nearest
from plum_partonomy.masks import DataError

BASELINES = ("random", "majority", "full_image", "ground_truth")
"""The baselines of scoring/baselines.py, listed here to keep --help fast."""
MODEL_BASELINES = ("sam3", "vlm", "vlm+sam3")


@dataclass(frozen=True)
class Group:
    """
    Options that the same runs use.

    Args:
        users: These runs in words, for --help and for errors.
        includes: Whether the run with these arguments is one of them.
    """

    users: str
    includes: Callable[["EvaluationArguments"], bool]


EVERY = Group("every evaluation", lambda run: True)
RECORDS = Group("--dataset partonomy and --predictions", lambda run: run.dataset == "partonomy" or run.reads_answers)
PARTONOMY = Group("--task partonomy", lambda run: run.is_partonomy)
ANSWERS = Group("--task partonomy with --predictions", lambda run: run.is_partonomy and run.reads_answers)
ASKED = Group(
    "--task partonomy with --model or --baseline sam3, vlm, vlm+sam3 or FILE.py",
    lambda run: run.is_partonomy and run.asks_model,
)
BATCHED = Group(
    "--task correction, and --task partonomy with --model or --baseline sam3, vlm, vlm+sam3 or FILE.py",
    lambda run: run.task == "correction" or (run.is_partonomy and run.asks_model),
)
LIKELIHOOD = Group(
    "--task partonomy with --model or a --vlm that chooses by likelihood",
    lambda run: (run.is_partonomy and run.asks_plum) or (run.loads_vlm and run.choices_by == "likelihood"),
)
GENERATED = Group(
    "--vlm, and --model without --task correction",
    lambda run: run.asks_vlm or (run.asks_plum and run.task != "correction"),
)
LOADED = Group(
    "--model, --sam3 and a --vlm that is not a URL", lambda run: run.asks_plum or run.asks_sam3 or run.loads_vlm
)
PLUM = Group("--task partonomy with --model", lambda run: run.is_partonomy and run.asks_plum)
VLM = Group("--baseline vlm or vlm+sam3", lambda run: run.asks_vlm)
SAM3 = Group("--baseline sam3 or vlm+sam3", lambda run: run.asks_sam3)


def option(group: Group, help: str, *, default: Any = MISSING) -> Any:
    """Return the dataclass field of an option."""
    return field(default=default, metadata={"help": help, "group": group})


@dataclass
class EvaluationArguments:
    """What to score, on which data, and how."""

    output_dir: str = option(EVERY, "Folder for predictions.jsonl, metrics.json and report.html.")
    model: str | None = option(EVERY, "Folder of a PLUM checkpoint, or its name on the Hub.", default=None)
    predictions: str | None = option(EVERY, "Instead: file with the answers of any model.", default=None)
    baseline: str | None = option(
        EVERY,
        "Instead: random, majority, full_image or ground_truth, which need no model; sam3, vlm or vlm+sam3; or a "
        "Python file with your own class Model.",
        default=None,
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
    ] = option(EVERY, "Task; docs/benchmark.md lists the metrics of each.", default="partonomy")
    dataset: str = option(EVERY, "Data set, as in datasets.load_dataset.", default="partonomy")
    name: str = option(EVERY, "Configuration of the data set, with questions.", default="mini_questions")
    split: str = option(EVERY, "Split of the data set.", default="test")
    data_dir: str | None = option(EVERY, "Folder of your files, if --name needs one.", default=None)
    scheme: Literal["official", "balanced"] | None = option(
        EVERY, "Distractor scheme of questions about --data_dir.", default=None
    )
    limit: int | None = option(EVERY, "Only the first questions of the split.", default=None)
    on_error: Literal["refuse", "report"] | None = option(
        RECORDS,
        "Unusable lines of --predictions and records of --data_dir: raise an error (refuse, the default) or skip them "
        "and write errors.jsonl (report). With an explicit refuse, masks of core that differ in size from their image "
        "are unusable as well; by default they are resized and counted.",
        default=None,
    )
    mask_source: Literal["gt_answer", "predicted_answer", "generated"] = option(
        PARTONOMY,
        "Masks scored by gIoU, cIoU and AP50: those of the correct, the chosen or the generated answer.",
        default="gt_answer",
    )
    match: Literal["exact", "lemmatised", "embedding"] = option(
        PARTONOMY, "How part names of generated answers are compared.", default="exact"
    )
    match_model: str | None = option(
        PARTONOMY,
        "For --match embedding: folder or Hub name of a sentence-embedding model of transformers.",
        default=None,
    )
    format: Literal["jsonl", "official"] = option(
        ANSWERS, "Format of --predictions; official is the json of the authors' scripts.", default="jsonl"
    )
    control: Literal["wrong_image", "none"] = option(
        ASKED, "Repeat all questions with the image of another record, or not.", default="wrong_image"
    )
    image_cache_size: int | None = option(
        ASKED,
        "Number of images whose features are kept in memory; default: 128 for PLUM, 8 for other models.",
        default=None,
    )
    batch_size: int = option(BATCHED, "Questions per step.", default=16)
    choice_reduction: Literal["sequence_mean", "answer_mean", "answer_sum"] = option(
        LIKELIHOOD,
        "Log-likelihood of a choice: mean over prompt and answer, as published, or over the answer only.",
        default="sequence_mean",
    )
    max_new_tokens: int = option(GENERATED, "Maximum length of a generated answer, in tokens.", default=96)
    device: Literal["auto", "cpu", "cuda"] = option(LOADED, "auto uses a GPU if there is one.", default="auto")
    dtype: Literal["float32", "bfloat16"] = option(LOADED, "Precision of the weights.", default="float32")
    cache_image_embeddings: str | None = option(
        PLUM, "Folder that caches the embeddings of SAM's encoder, in bfloat16.", default=None
    )
    vlm: str | None = option(
        VLM,
        "Folder or Hub name of a vision-language model of transformers; or the URL of an API such as "
        "http://localhost:8000/v1, which answers with letters of choices.",
        default=None,
    )
    choices_by: Literal["likelihood", "letter"] = option(
        VLM, "How --vlm chooses: by the likelihood of choices or of their letters.", default="likelihood"
    )
    sam3: str | None = option(SAM3, "Folder or Hub name of a SAM 3 of transformers.", default=None)
    sam3_prompt: Literal["part", "part_of_object"] = option(
        SAM3, 'Prompt of SAM 3: "left wing", or "left wing of the plane".', default="part"
    )
    sam3_threshold: float = option(SAM3, "Minimum score of an instance of SAM 3.", default=0.3)

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
        if not self.is_partonomy and self.baseline is not None:
            raise DataError(f"--task {self.task} scores a --model or --predictions: pass one of these.")
        for each in fields(self):
            group = each.metadata["group"]
            if getattr(self, each.name) != each.default and not group.includes(self):
                raise DataError(f"--{each.name} has no effect here, it is used by {group.users}: leave it out.")
        if (self.match == "embedding") != (self.match_model is not None):
            raise DataError("--match embedding and --match_model belong together: give both or neither.")
        for name in ("max_new_tokens", "batch_size", "image_cache_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"--{name} must be at least 1, found {value}.")

    @property
    def is_partonomy(self) -> bool:
        return self.task == "partonomy"

    @property
    def reads_answers(self) -> bool:
        return self.predictions is not None

    @property
    def asks_plum(self) -> bool:
        return self.model is not None

    @property
    def asks_vlm(self) -> bool:
        return self.baseline in ("vlm", "vlm+sam3")

    @property
    def asks_sam3(self) -> bool:
        return self.baseline in ("sam3", "vlm+sam3")

    @property
    def asks_model(self) -> bool:
        """Whether questions go to a model: PLUM, one of others, or one of a Python file."""
        return self.asks_plum or (self.baseline is not None and self.baseline not in BASELINES)

    @property
    def loads_vlm(self) -> bool:
        """Whether a vision-language model is loaded, not asked through an API."""
        return self.asks_vlm and not (self.vlm or "").startswith(("http://", "https://"))


class EvaluationOptions(Options, HfArgumentParser):
    """Parser of the options of an evaluation; --help lists them by group."""

    def add_argument(self, *names: str, group: Group | None = None, **options: Any):
        if group is None:
            return super().add_argument(*names, **options)
        title = f"used by {group.users}"
        listed = next((each for each in self._action_groups if each.title == title), None)
        return (listed or self.add_argument_group(title)).add_argument(*names, **options)


def parse_arguments(options: list[str] | None = None) -> EvaluationArguments:
    """Return the arguments of a command line. A wrong option ends the command with one sentence and exit status 2."""
    parser = EvaluationOptions(EvaluationArguments, prog="evaluate_plum.py", allow_abbrev=False)
    try:
        (arguments,) = parser.parse_args_into_dataclasses(options, look_for_args_file=False)
    except DataError as error:
        parser.error(str(error))
    return arguments
