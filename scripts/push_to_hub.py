"""
Push a checkpoint, a data set, a metric or a demo to the Hub, after a check that it loads from its folder:

    python scripts/push_to_hub.py model runs/mine --repo_id user/plum --metrics runs/eval/metrics.json \\
        --benchmark user/partonomy
    python scripts/push_to_hub.py dataset partonomy --repo_id user/partonomy
    python scripts/push_to_hub.py metrics metrics/partonomy_masks --repo_id user/partonomy_masks
    python scripts/push_to_hub.py space runs/space --repo_id user/plum-demo

The token is that of `hf auth login` or HF_TOKEN; there is no option for it, so that it appears in no log. Run the same
command again to continue an interrupted upload; files that have arrived are not sent again.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path

import datasets
import evaluate
from huggingface_hub import DatasetCard, HfApi, RepoCard
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModel, AutoProcessor

from plum_partonomy.hub import handler
from plum_partonomy.hub.croissant import check_croissant
from plum_partonomy.hub.eval_results import check_eval_yaml, eval_results_file, make_eval_results, make_eval_yaml
from plum_partonomy.hub.model_card import CURVES_FILE, RECIPE_FILE, make_model_card
from plum_partonomy.inference.checkpoint import check_checkpoint
from plum_partonomy.scoring.results import fingerprint_model

EVAL_FILE = "eval.yaml"

# The files of a folder that are pushed. Optimizer states and pickled arguments are not.
MODEL_FILES = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]
MODEL_FILES += ["*.py", "*.jinja", "processor_config.json", "tokenizer*", "special_tokens_map.json", "vocab.json"]
MODEL_FILES += ["merges.txt", RECIPE_FILE, CURVES_FILE]
DATASET_FILES = ["README.md", EVAL_FILE, "SHA256SUMS", "errors.jsonl", "**/*.parquet", "**/*.json"]
SPACE_FILES = ["README.md", "**/*.py", "requirements.txt", "packages.txt", "**/*.json", "**/*.css", "**/*.js"]
SPACE_FILES += ["**/*.png", "checkpoints/**"]


class PushError(Exception):
    """A folder that cannot be pushed, or an error of the Hub; the message is for users."""


# ------------------------------------------------------------------------------------------------ what


def prepare_model(folder: Path, arguments: argparse.Namespace) -> None:
    """Raise `PushError` unless the folder loads with its own code, and the metrics are of this checkpoint."""
    check_checkpoint(folder)
    model, report = AutoModel.from_pretrained(
        folder, trust_remote_code=True, use_safetensors=True, dtype="auto", output_loading_info=True
    )
    problems = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    if problems:
        raise PushError(f"The weights of {folder} do not fit its code and config: {problems}.")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    if processor.image_token_id != model.config.vlm_config.image_token_id:
        raise PushError(f"The processor of {folder} has another image token than its model.")
    shutil.copy(handler.__file__, folder / "handler.py")
    if arguments.benchmark is not None:
        if arguments.metrics is None:
            raise PushError("--benchmark names where the results of --metrics belong: give both.")
        make_eval_results(arguments.metrics, benchmark=arguments.benchmark)
    measured = (arguments.metrics or {}).get("run", {}).get("model_fingerprint")
    if arguments.metrics and measured != fingerprint_model(arguments.folder):
        raise PushError(f"The metrics are not those of {folder}: it has changed since, or they are another model's.")


def prepare_dataset(folder: Path, arguments: argparse.Namespace) -> None:
    """Raise `PushError` unless the card names files with records, in every configuration and split."""
    card = DatasetCard.load(folder / "README.md").data.to_dict()
    configs = card.get("configs") or []
    if not configs:
        raise PushError(f"{folder / 'README.md'} names no configs in its metadata.")
    check_croissant(folder)
    names = [config["config_name"] for config in configs]
    if (folder / EVAL_FILE).exists():
        check_eval_yaml((folder / EVAL_FILE).read_text(encoding="utf-8"), configs=names)
    elif any(name == "core" or name.endswith("_questions") for name in names):
        (folder / EVAL_FILE).write_text(make_eval_yaml(card.get("pretty_name") or "PARTONOMY", names))
    for config in configs:
        name = config["config_name"]
        for split, records in datasets.load_dataset(str(folder), name, streaming=True).items():
            if next(iter(records), None) is None:
                raise PushError(f"{folder}: split {split!r} of {name!r} has no records.")


def prepare_metric(folder: Path, arguments: argparse.Namespace) -> None:
    """Raise `PushError` unless `evaluate.load` will find the metric in its Space."""
    name = arguments.repo_id.split("/")[-1]
    if not (folder / f"{name}.py").is_file():
        raise PushError(f"evaluate.load('{arguments.repo_id}') looks for {name}.py, which {folder} does not hold.")
    evaluate.load(str(folder / f"{name}.py"))
    prepare_space(folder, arguments)


def prepare_space(folder: Path, arguments: argparse.Namespace) -> None:
    """Raise `PushError` unless the app that the card names can be imported in a separate process."""
    card = RepoCard.load(folder / "README.md").data
    app = folder / (card.get("app_file") or "app.py")
    if card.get("sdk") != "gradio" or not app.is_file():
        raise PushError(f"{folder / 'README.md'} must name sdk: gradio and an app_file of the folder.")
    script = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='app')"
    run = subprocess.run(
        [sys.executable, "-c", script, app.relative_to(folder)], cwd=folder, capture_output=True, text=True
    )
    if run.returncode:
        raise PushError(f"{app} does not start: {run.stderr.strip().splitlines()[-1]}")


KINDS = {
    "model": ("model", MODEL_FILES, prepare_model),
    "dataset": ("dataset", DATASET_FILES, prepare_dataset),
    "metrics": ("space", SPACE_FILES, prepare_metric),
    "space": ("space", SPACE_FILES, prepare_space),
}


# ------------------------------------------------------------------------------------------------ push


def stage(folder: Path, into: Path, patterns: list[str]) -> list[str]:
    """
    Link the files of a folder that are pushed, and return the names of the others. In a pattern, `**/` stands for any
    folders or none; a pattern without a slash matches files of the folder itself. Raises `PushError` for a link out of
    the folder.
    """
    patterns = [*patterns, *(pattern.removeprefix("**/") for pattern in patterns if pattern.startswith("**/"))]
    deep = [pattern for pattern in patterns if "/" in pattern]
    inside = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    hidden = ["__pycache__/*", "*/__pycache__/*", ".*", "*/.*"]
    wanted = filter_repo_objects(inside, allow_patterns=patterns, ignore_patterns=hidden)
    pushed = [name for name in wanted if "/" not in name or any(fnmatch(name, pattern) for pattern in deep)]
    for name in pushed:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise PushError(f"{folder / name} is outside the folder: put the file itself there, or remove it.")
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        (into / name).symlink_to((folder / name).resolve())
    return sorted(set(inside) - set(pushed))


def describe_left_out(names: list[str], folder: Path) -> list[str]:
    """Return a line with the size for each file and each folder of files that is not pushed."""
    sizes: dict[str, int] = {}
    for name in names:
        top = name.split("/")[0] + ("/" if "/" in name else "")
        sizes[top] = sizes.get(top, 0) + (folder / name).stat().st_size
    return [f"left out: {name} ({size:,} bytes)" for name, size in sorted(sizes.items())]


def push(folder: Path, arguments: argparse.Namespace) -> None:
    repo_type = KINDS[arguments.kind][0]
    api, repo_id, branch = HfApi(), arguments.repo_id, arguments.revision
    where = {"repo_id": repo_id, "repo_type": repo_type}
    sdk = {"space_sdk": "gradio"} if repo_type == "space" else {}
    api.create_repo(**where, **sdk, private=arguments.private or None, exist_ok=True)
    if branch is not None:
        api.create_branch(**where, branch=branch, exist_ok=True)
    commit = api.upload_folder(**where, folder_path=folder, revision=branch)
    print(f"{repo_type} {repo_id} is on the Hub; revision={commit.oid!r} pins it.")
    if arguments.kind == "model":
        # The card is pushed after the commit that it names, the one with the weights and the code loaded above.
        card = model_card(arguments, revision=commit.oid)
        api.upload_file(**where, path_or_fileobj=str(card).encode(), path_in_repo="README.md", revision=branch)
        if arguments.benchmark is not None:
            results = make_eval_results(arguments.metrics, benchmark=arguments.benchmark)
            place = eval_results_file(arguments.metrics)
            api.upload_file(**where, path_or_fileobj=results.encode(), path_in_repo=place, revision=branch)


def model_card(arguments: argparse.Namespace, *, revision: str) -> RepoCard:
    return make_model_card(
        arguments.folder,
        repo_id=arguments.repo_id,
        revision=revision,
        metrics=arguments.metrics,
        license=arguments.license,
    )


def read_metrics(path: str) -> dict:
    return json.loads(Path(path).read_text())


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="kind", required=True)
    for kind in KINDS:
        options = subparsers.add_parser(kind)
        options.add_argument("folder", type=Path, help="what is pushed")
        options.add_argument(
            "--repo_id", required=True, help="user/name of the repository; created if it does not exist"
        )
        options.add_argument("--private", action="store_true", help="make a new repository private")
        options.add_argument("--revision", help="branch to push to; created if it does not exist (default: main)")
        options.add_argument("--dry_run", action="store_true", help="check and list, push nothing")
        if kind == "model":
            options.add_argument("--metrics", type=read_metrics, help="metrics.json of its evaluation, for the card")
            options.add_argument(
                "--benchmark", help="data set on the Hub whose leaderboard gets --metrics, in .eval_results/"
            )
            options.add_argument("--license", help="licence of the weights, if they are not trained from scratch")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    _, patterns, prepare = KINDS[arguments.kind]
    with tempfile.TemporaryDirectory() as staging:
        folder = Path(staging, "repository")
        folder.mkdir()
        try:
            others = stage(arguments.folder, folder, patterns)
            print(*describe_left_out(others, arguments.folder), sep="\n", end="\n" if others else "")
            prepare(folder, arguments)
            if not arguments.dry_run:
                return push(folder, arguments)
        except (PushError, ValueError, OSError, ImportError, RuntimeError, HfHubHTTPError) as error:
            raise SystemExit(f"Not pushed: {str(error).replace(str(folder), str(arguments.folder))}") from error
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            print(f"{path.stat().st_size:>14,}  {path.relative_to(folder)}")
        if arguments.kind == "model":
            print(model_card(arguments, revision="COMMIT"))
            if arguments.benchmark is not None:
                print(f"\n{eval_results_file(arguments.metrics)}")
                print(make_eval_results(arguments.metrics, benchmark=arguments.benchmark))


if __name__ == "__main__":
    main(sys.argv[1:])
