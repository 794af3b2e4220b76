"""Compare models on the same questions, from files of their predictions, on one HTML page:

    python scripts/compare_predictions.py plum=runs/demo/evaluation/predictions.jsonl theirs=answers.jsonl \\
        --dataset partonomy --name mini_questions --split test --output comparison.html

Differences are relative to the first file. docs/benchmark.md describes the files.
"""

import argparse
from pathlib import Path

import partonomy_dataset  # noqa: F401  (makes load_dataset("partonomy", ...) work)
from plum_partonomy.command_line import Options, check_writable, run_command
from plum_partonomy.masks import DataError
from plum_partonomy.scoring.answers import read_answers
from plum_partonomy.scoring.benchmark import load_image, load_questions
from plum_partonomy.scoring.comparison import write_comparison
from plum_partonomy.scoring.results import leave_out


def parse_models(arguments: list[str]) -> dict[str, Path]:
    """Return model name -> file, from NAME=FILE or FILE, whose name is then the file name."""
    models = {}
    for argument in arguments:
        name, separator, path = argument.partition("=")
        if not separator or Path(argument).is_file():
            name = path = argument
        if name in models:
            raise DataError(f"Two models are called {name!r}: give each its own name, as NAME=FILE.")
        models[name] = Path(path)
    return models


def main() -> None:
    parser = Options(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", nargs="+", metavar="[NAME=]FILE", help="predictions files, one per model")
    parser.add_argument("--format", default="jsonl", choices=("jsonl", "official"), help="format of the files")
    parser.add_argument("--dataset", default="partonomy", help="data set, as in datasets.load_dataset")
    parser.add_argument("--name", default="mini_questions", help="its configuration, with questions")
    parser.add_argument("--split", default="test", help="its split")
    parser.add_argument("--data_dir", help="folder of raw data")
    parser.add_argument("--scheme", help="distractor scheme of the questions about --data_dir")
    parser.add_argument("--limit", type=int, help="only the first questions of the split")
    parser.add_argument("--mask_source", default="gt_answer", choices=("gt_answer", "predicted_answer", "generated"))
    parser.add_argument("--output", type=Path, required=True, help="the HTML file")
    options = parser.parse_args()
    check_writable(options.output.parent, "output")
    files = parse_models(options.predictions)
    place = {"name": options.name, "split": options.split, "data_dir": options.data_dir, "limit": options.limit}
    if options.scheme is not None:
        place["scheme"] = options.scheme
    rows, questions = load_questions(options.dataset, **place)
    models = {}
    for name, path in files.items():
        models[name], problems = read_answers(path, questions, mask_source=options.mask_source, format=options.format)
        leave_out(questions, models[name], problems, report_to=None)
    row_of_question = {name: index for index, name in enumerate(rows["id"])}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_comparison(
        options.output,
        questions=questions,
        models=models,
        load_image=lambda question: load_image(rows, row_of_question[question.id], question),
        mask_source=options.mask_source,
    )
    print(f"comparison: {options.output}")


if __name__ == "__main__":
    run_command("compare_predictions.py", main, ["output"])
