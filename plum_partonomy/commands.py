"""The commands of `plum`: the parser, and one function per command."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.text import Text

from plum_partonomy.cli import BAD_INPUT, NO_MODEL
from plum_partonomy.cli import __doc__ as USAGE
from plum_partonomy.command_line import Options, as_options, check_writable, complain
from plum_partonomy.inference.inputs import ModelError, check_phrases, check_text, read_image
from plum_partonomy.masks import DataError

LISTED_PROBLEMS = 20
DEFAULT_MODEL = Path(__file__).resolve().parents[1] / "checkpoints" / "plum-tiny"


class PipedConsole(Console):
    """A console that leaves a closed pipe to `main`."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def run(arguments: Sequence[str] | None) -> int:
    """Run a command line and return its exit code; errors are exceptions."""
    options, rest = make_parser().parse_known_args(arguments)
    if rest and options.run not in (evaluate, train):
        if options.run is ask and not rest[0].startswith("-"):
            make_parser().error(f"expected one question, found further words {rest}: put the question in quotes")
        make_parser().parse_args(arguments)  # raises the error for the unknown argument
    try:
        return options.run(options, rest) or 0
    except DataError as error:
        complain("plum", as_options(str(error), ["data_dir", "model", "save"]))
        return NO_MODEL if isinstance(error, ModelError) else BAD_INPUT


def make_parser() -> Options:
    kind = argparse.RawDescriptionHelpFormatter
    parser = Options(prog="plum", description=USAGE, formatter_class=kind, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    about_an_image = Options(add_help=False)
    about_an_image.add_argument("image", metavar="IMAGE", help="image file, URL, or - for standard input")
    about_an_image.add_argument(
        "--model", type=named, default=DEFAULT_MODEL, help="folder or name on the Hub; default: plum-tiny"
    )
    about_an_image.add_argument(
        "--json", action="store_true", help="print one JSON object per line, with masks as RLE"
    )
    help = "folder for overlay, masks and COCO json"
    about_an_image.add_argument("--save", type=as_folder, metavar="DIR", help=help)

    command = commands.add_parser("ask", parents=[about_an_image], help="ask one question about an image")
    command.add_argument("question", help="the question")
    command.set_defaults(run=ask)
    command = commands.add_parser("chat", parents=[about_an_image], help="ask questions, one per line")
    command.set_defaults(run=chat)
    command = commands.add_parser("segment", parents=[about_an_image], help="segment parts that you name")
    command.add_argument(
        "--spans", required=True, metavar='"PART, PART"', help="names of the parts, separated by commas"
    )
    command.add_argument("--boxes", metavar='"X0 Y0 X1 Y1, ..."', help="a box around each of the parts, in pixels")
    command.set_defaults(run=segment)
    command = commands.add_parser("eval", add_help=False, help="score a model or its answers (evaluate_plum.py)")
    command.set_defaults(run=evaluate)
    command.knows_all = False
    command = commands.add_parser("train", add_help=False, help="train a model (train.py)")
    command.set_defaults(run=train)
    command.knows_all = False
    add_data_commands(commands.add_parser("data", help="check, count or draw a data set"))
    return parser


def named(text: str) -> str:
    if not text.strip():  # such as a variable of the shell that is not set
        raise argparse.ArgumentTypeError("expected a name, found an empty text")
    return text


def as_folder(text: str) -> Path:
    return Path(named(text))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number from 1, found {text!r}")
    return int(text)


def known_source(name: str) -> str:
    from plum_partonomy.sources.validate import CHECKS  # slower to import than --help takes

    if name not in CHECKS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(CHECKS)}, found {name!r}")
    return name


def add_data_commands(parser: Options) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("validate", help="check a downloaded data set before a long build")
    help = "name of the data set, such as pascal_part; default: own_parts"
    command.add_argument("source", nargs="?", type=known_source, default="own_parts", metavar="SOURCE", help=help)
    command.add_argument("folder", type=Path, metavar="FOLDER")
    command.add_argument("--errors", type=Path, metavar="FILE.jsonl", help="file for all problems")
    command.set_defaults(run=validate)

    of_a_split = Options(add_help=False)
    of_a_split.add_argument("name", help='configuration of load_dataset("partonomy", ...), such as mini_questions')
    of_a_split.add_argument("--split", default="test", help="default: test")
    of_a_split.add_argument("--data_dir", help="folder of raw data, if the name needs one")
    command = commands.add_parser("stats", parents=[of_a_split], help="count records, objects, parts and masks")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.set_defaults(run=count)
    command = commands.add_parser("preview", parents=[of_a_split], help="draw the masks of the first images")
    command.add_argument(
        "--save", type=as_folder, default="preview", metavar="DIR", help="folder of PNGs; default: preview"
    )
    command.add_argument("--count", type=positive, default=8, help="how many images; default: 8")
    command.set_defaults(run=preview)


# ---------------------------------------------------------------- about an image


def ask(options: argparse.Namespace, rest: Sequence[str]) -> None:
    check_text(options.question, what="a question")
    plum, image = open_both(options)
    from plum_partonomy.inference.one_image import ask

    show(plum, ask(plum, image, options.question), options)


def segment(options: argparse.Namespace, rest: Sequence[str]) -> None:
    phrases = check_phrases(options.spans.split(","))
    boxes = read_boxes(options.boxes, count=len(phrases))
    plum, image = open_both(options)
    from plum_partonomy.inference.one_image import Prompt, segment_phrases

    prompts = [Prompt(box=box) for box in boxes]
    show(plum, segment_phrases(plum, image, phrases, prompts=prompts), options)


def read_boxes(text: str | None, *, count: int) -> list[tuple[float, ...]]:
    """Return the boxes of an option. Raises DataError if one is not four numbers, or their number is not `count`."""
    try:
        boxes = [tuple(map(float, box.split())) for box in (text.split(",") if text is not None else [])]
    except ValueError as error:
        raise DataError(f"--boxes needs four numbers of each box, found {text!r} ({error}).") from error
    if any(len(box) != 4 for box in boxes):
        raise DataError(f"--boxes needs x0 y0 x1 y1 of each box, separated by commas, found {text!r}.")
    if text is not None and len(boxes) != count:
        raise DataError(f"--boxes needs a box for each of {count} parts of --spans, found {len(boxes)}.")
    return boxes


def chat(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Continue after a question that cannot be answered, and return 1 at the end if there was one."""
    if options.image == "-":
        raise DataError("The questions come from standard input: pass the image as a file.")
    plum, image = open_both(options)
    from plum_partonomy.inference.one_image import ask, remember

    history: list[dict[str, str]] = []
    encoded, code = None, 0
    for number, question in enumerate(read_questions(), start=1):
        try:
            reply = ask(plum, image, question, history=history, encoded=encoded)
        except DataError as error:
            complain("plum", str(error))
            code = BAD_INPUT
            continue
        history, encoded = remember(reply), reply.encoded
        show(plum, reply, options, folder=options.save and options.save / f"{number:02}")
    return code


def read_questions() -> Iterator[str]:
    """Yield the lines of standard input, with a prompt on a terminal."""
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() and sys.stdout.isatty() else input()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise DataError(f"The questions are not text in UTF-8: {error}.") from error
        if line.strip():
            yield line


def open_both(options: argparse.Namespace):
    """Return image and model. The folder and the image are checked first, before the slow imports of the model."""
    if options.save is not None:
        check_writable(options.save, "save")
    image = read_image(sys.stdin.buffer if options.image == "-" else options.image)
    if options.model == DEFAULT_MODEL and not DEFAULT_MODEL.is_dir():
        raise ModelError(
            "Expected --model: plum-tiny is part of the repository, not of the installed package; pass --model with "
            "a folder or a name on the Hub."
        )
    from transformers.utils.logging import disable_progress_bar

    from plum_partonomy.inference.one_image import load_model

    disable_progress_bar()
    _, plum = load_model(options.model)
    return plum, image


def show(plum, reply, options: argparse.Namespace, *, folder: Path | None = None) -> None:
    """Print an answer, with its spans in the colours of their masks, and save it if requested."""
    from plum_partonomy.inference.one_image import as_json, finish, save, warn_of_unknown_image
    from plum_partonomy.scoring.overlays import highlight, pick_colours

    answer = finish(plum, reply)
    if warning := warn_of_unknown_image(plum, answer):
        complain("plum", warning)
    folder = folder or options.save
    write = partial(save, answer, reply.image, folder, file_name=Path(options.image).name)
    if options.json:
        print(json.dumps(as_json(answer)), flush=True)  # before it is saved: a full disk loses no answer
        if folder:
            write()
        return
    if answer.is_truncated:
        complain("plum", "the answer is truncated, it reached the token limit.")
    console = PipedConsole(highlight=False, soft_wrap=True)
    pieces = highlight(answer.text, answer.spans)
    console.print(Text.assemble(*((piece, f"bold {colour}" if colour else "") for piece, colour in pieces)))
    for span, colour in zip(answer.spans, pick_colours(len(answer.spans)), strict=True):
        line = f"  score {span.score:.2f}  box {span.box}  {int(span.mask.sum())} pixels"
        console.print(Text.assemble("  ", (span.text, colour), line))
    sys.stdout.flush()
    for path in write() if folder else []:
        console.print(Text(f"wrote {path}", style="dim"))


# ---------------------------------------------------------------- benchmark and data


def evaluate(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from plum_partonomy.evaluation.run import main

    main(list(rest))


def train(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from plum_partonomy.training.run import main

    main(list(rest))


def validate(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Print the first problems; return 1 if there is one."""
    from plum_partonomy.sources.problems import write_problems
    from plum_partonomy.sources.validate import validate

    report = validate(options.source, options.folder)
    if options.errors is not None:
        write_problems(options.errors, report.problems)
    for note in report.notes:
        print(note)
    for problem in report.problems[:LISTED_PROBLEMS]:
        print(f"problem: {problem}")
    if len(report.problems) > LISTED_PROBLEMS:
        print(f"and {len(report.problems) - LISTED_PROBLEMS} more problems")
    if report.problems:
        count = "1 problem" if len(report.problems) == 1 else f"{len(report.problems)} problems"
        print(f"{options.folder} cannot be built: {count}")
        return BAD_INPUT
    print(f"{options.folder} is complete")
    return 0


def open_split(options: argparse.Namespace):
    """Return the records of a split. Raises DataError if it does not exist."""
    import datasets

    import partonomy_dataset
    from plum_partonomy.loading import load_split

    datasets.utils.logging.disable_progress_bar()
    return load_split(partonomy_dataset.DATASET_NAME, options.name, split=options.split, data_dir=options.data_dir)


def distinct_masks(row: dict) -> list[dict]:
    """Return each mask of a record once; a conversation may name a part several times."""
    return list({(mask["label"], mask["rle"]["counts"]): mask for mask in row["masks"]}.values())


def count(options: argparse.Namespace, rest: Sequence[str]) -> None:
    rows = open_split(options).select_columns(["image_id", "image_label", "masks"])
    masks = {
        (row["image_id"], mask["label"], mask["rle"]["counts"]): mask["label"]
        for row in rows
        for mask in distinct_masks(row)
    }
    by_part = Counter(masks.values())
    counts = {
        "records": len(rows),
        "images": len(set(rows["image_id"])),
        "objects": len(set(rows["image_label"])),
        "parts": len(by_part),
        "masks": len(masks),
    }
    if options.json:
        print(json.dumps({**counts, "masks by part": by_part}, sort_keys=True))
        return
    for name, number in [*counts.items(), *((f"  {part}", by_part[part]) for part in sorted(by_part))]:
        print(f"{number:>10,}  {name}")


def preview(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from plum_partonomy.images import read_image, undecoded
    from plum_partonomy.masks import decode
    from plum_partonomy.scoring.overlays import overlay

    rows = undecoded(open_split(options))
    options.save.mkdir(parents=True, exist_ok=True)
    first = list({image: index for index, image in reversed(list(enumerate(rows["image_id"])))}.values())
    for index, row in enumerate(rows.select(sorted(first)[: options.count])):
        image, masks = read_image(row["image"], where=f"record {row['id']}, field 'image'"), distinct_masks(row)
        drawn = overlay(image, [decode(mask["rle"], expected_size=(image.height, image.width)) for mask in masks])
        path = options.save / f"{index:04}.png"
        drawn.save(path)
        print(f"{path}  {row['image_label']}: {', '.join(mask['label'] for mask in masks)}")
