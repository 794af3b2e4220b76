"""What goes to the Hub and what comes back, by the clients that people use, against a stand-in on this machine."""

import contextlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from plum_partonomy.hub.model_card import write_recipe
from plum_partonomy.scoring.results import fingerprint_model
from scripts.push_to_hub import DATASET_FILES, MODEL_FILES, PushError, describe_left_out, main, stage
from tests.hub.test_eval_results import measured
from tests.hub_stub import HubStub
from tests.tiny import tiny_model, tiny_processor

ROOT = Path(__file__).parents[2]
TOKEN = "hf_SecretOfTheTests"

PUSH = """
import json, sys
sys.path.insert(0, sys.argv[1])
from plum_partonomy.hub.model_card import write_recipe
from scripts.push_to_hub import main

for command in json.loads(sys.argv[2]):
    try:
        main(command)
    except SystemExit as error:
        print(error, file=sys.stderr)
"""

READ = """
import json, os, sys

import evaluate
from datasets import load_dataset
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

pinned = {"trust_remote_code": True, "revision": sys.argv[1]}
processor = AutoProcessor.from_pretrained("user/plum", **pinned)
chat = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (70, 50))},
                                     {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A <p>wheel</p>."}]
inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
found = {}
for auto_class in (AutoModel, AutoModelForImageTextToText):
    outputs = auto_class.from_pretrained("user/plum", **pinned).segment_spans(**inputs)
    found[auto_class.__name__] = float(outputs.pred_masks.sum())
found["span"] = processor.post_process_segmentation(outputs)[0].spans[0].text
pipe = pipeline(model="user/plum", **pinned)
answer = pipe({"image": Image.new("RGB", (70, 50)), "text": "What is it?"}, max_new_tokens=4)
found["pipeline"] = answer["generated_text"]
for name in ("mini_instances", "mini_questions"):
    found[name] = load_dataset("user/partonomy", name, split="validation")[0]["id"]
    if "HF_HUB_OFFLINE" not in os.environ:  # a stream is not cached
        stream = load_dataset("user/partonomy", name, split="validation", streaming=True)
        assert next(iter(stream))["id"] == found[name]
hull = {"label": "hull", "rle": {"size": [1, 4], "counts": "022"}}
half = {"label": "hull", "rle": {"size": [1, 4], "counts": "013"}, "score": 0.9}
metric = evaluate.load("user/partonomy_masks")
found["giou"] = metric.compute(predictions=[[half]], references=[[hull]])["strict_macro_giou"]
own = {"modeling_plum", "processing_plum", "plum_partonomy", "partonomy_dataset"} & set(sys.modules)
assert not own, own
print(json.dumps(found))
"""


def run(script: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(script), *arguments],
        cwd=cwd,
        env=kept | {"HF_HUB_DISABLE_XET": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny model in several files, its processor, and what a training leaves beside them."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    tiny_model().save_pretrained(folder, max_shard_size="300KB")
    tiny_processor().save_pretrained(folder)
    recipe = {"dataset": "partonomy", "name": "mini", "data_dir": "/home/someone", "model_config": {}, "max_steps": 3}
    write_recipe(folder, recipe)
    (folder / "training_args.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "README.md").write_text("---\ntitle: PLUM\nsdk: gradio\napp_file: app.py\n---\n")
    (folder / "app.py").write_text("import json\n")
    return folder


@pytest.fixture(scope="module")
def hub():
    with HubStub() as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(hub, checkpoint, space, tmp_path_factory) -> subprocess.CompletedProcess:
    """Every kind pushed once, the model as well without effect, interrupted and again."""
    model = ["model", str(checkpoint), "--repo_id", "user/plum", "--revision", "v1"]
    metrics = tmp_path_factory.mktemp("evaluation") / "metrics.json"
    metrics.write_text(json.dumps(measured(model_fingerprint=fingerprint_model(checkpoint))))
    model += ["--metrics", str(metrics), "--benchmark", "user/partonomy"]
    commands = [
        [*model[:3], "user/dry", *model[4:], "--dry_run"],
        model,
        model,
        ["dataset", str(ROOT / "partonomy"), "--repo_id", "user/partonomy"],
        ["metrics", str(ROOT / "metrics" / "partonomy_masks"), "--repo_id", "user/partonomy_masks"],
        ["space", str(space), "--repo_id", "user/demo", "--private"],
    ]
    hub.uploads_until_failure = 1
    cwd = tmp_path_factory.mktemp("elsewhere")
    debugging = {"HF_HUB_VERBOSITY": "debug", "HF_DEBUG": "1"}
    environment = {"HF_HOME": str(cwd / "hf"), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    return run(PUSH, str(ROOT), json.dumps(commands), cwd=cwd, **environment, **debugging)


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_link_out_of_the_folder_is_refused_and_one_inside_it_is_not(place, tmp_path):
    folder, outside, staging = (tmp_path / name for name in ("mine", "secrets", "staging"))
    for made in (folder, outside, staging):
        made.mkdir()
    (outside / "key.json").write_text("secret")
    (folder / "a.json").write_text("{}")
    (folder / "b.json").symlink_to("a.json")
    stage(folder, staging, DATASET_FILES)
    assert sorted(path.name for path in staging.iterdir()) == ["a.json", "b.json"]
    if place == "file":
        (folder / "c.json").symlink_to(outside / "key.json")
        with pytest.raises(PushError, match="c.json is outside the folder"):
            stage(folder, tmp_path / "again", DATASET_FILES)
    else:
        (folder / "c").symlink_to(outside)
        with contextlib.suppress(PushError):
            stage(folder, tmp_path / "again", DATASET_FILES)
    assert not [path for path in (tmp_path / "again").rglob("*") if path.is_file() and path.read_text() == "secret"]


def test_an_interrupted_upload_is_repeated_without_sending_again_what_has_arrived(hub, pushed, checkpoint):
    assert "Not pushed" in pushed.stderr
    weights = {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}
    assert len(weights) > 2
    files = hub.files("model", "user/plum", "v1")
    assert weights.items() <= files.items()
    known = {oid for oid, content in hub.large_files.items() if content in weights.values()}
    uploads = [request for request in hub.requests if request.startswith("PUT ")]
    sent = [request for request in uploads if request.rsplit("/")[-1] in known]
    assert len(known) == len(weights) and len(sent) == len(weights) + 1, "one was refused and sent once more"


def test_a_dry_run_lists_files_and_card_and_leaves_the_hub_alone(hub, pushed):
    assert ("model", "user/dry") not in hub.repositories
    assert "configuration_plum.py" in pushed.stdout and "pipeline_tag: image-text-to-text" in pushed.stdout


def test_no_log_holds_the_token(pushed):
    assert "/api/repos/create" in pushed.stderr, "the log is one that shows requests"
    assert TOKEN not in pushed.stdout + pushed.stderr


def test_the_repository_holds_what_is_needed_and_no_pickle_or_private_path(hub, pushed):
    files = hub.files("model", "user/plum", "v1")
    assert {"config.json", "modeling_plum.py", "processor_config.json", "tokenizer.json", "README.md"} <= files.keys()
    assert not [name for name in files if name.endswith((".bin", ".pt"))]
    assert list(hub.files("model", "user/plum")) == [".gitattributes"], "main is not the branch that was asked for"
    assert hub.repositories["space", "user/demo"].private and not hub.repositories["model", "user/plum"].private
    assert not [name for name, content in files.items() if b"someone" in content]


def test_the_card_of_the_model_pins_the_commit_with_the_weights_and_code_that_were_loaded(hub, pushed):
    card = ModelCard(hub.files("model", "user/plum", "v1")["README.md"].decode())
    assert card.data.license == "apache-2.0" and "custom_code" in card.data.tags
    (commit,) = [oid for oid in hub.repositories["model", "user/plum"].commits if f'"revision": "{oid}"' in card.text]
    pinned = hub.files("model", "user/plum", commit)
    assert pinned.items() <= hub.files("model", "user/plum", "v1").items() and "model.safetensors.index.json" in pinned


def test_fresh_processes_read_everything_back_and_then_offline_without_a_request(hub, pushed, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    where = {"cwd": tmp_path / "elsewhere", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    where["HF_DATASETS_CACHE"] = str(tmp_path / "hf" / "datasets")
    online = run(READ, "v1", **where)
    found = json.loads(online.stdout)
    assert found["AutoModel"] == found["AutoModelForImageTextToText"] != 0
    assert found["span"] == "wheel" and found["giou"] == 0.5 and found["pipeline"]
    asked = len(hub.requests)
    offline = run(READ, "v1", **where, HF_HUB_OFFLINE="1", HF_EVALUATE_OFFLINE="1")
    assert json.loads(offline.stdout) == found
    assert len(hub.requests) == asked


def test_results_lie_where_the_hub_looks_for_them(hub, pushed):
    files = hub.files("model", "user/plum", "v1")
    entries = parse_eval_result_entries(yaml.safe_load(files[".eval_results/mini_questions.yaml"]))
    tasks = {task["id"] for task in yaml.safe_load(hub.files("dataset", "user/partonomy")["eval.yaml"])["tasks"]}
    assert {entry.task_id for entry in entries} <= tasks and {entry.dataset_id for entry in entries} == {
        "user/partonomy"
    }
    assert ".eval_results/mini_questions.yaml" in pushed.stdout  # of the dry run
    assert "EndpointHandler" in files["handler.py"].decode()


def _lacking_a_tensor(folder: Path) -> list[str]:
    model, other = tiny_model(), tiny_model(mask_feedback=False)
    model.save_pretrained(folder)
    other.save_pretrained(folder.parent / "other")
    (folder.parent / "other" / "model.safetensors").replace(folder / "model.safetensors")
    return ["model", str(folder), "--repo_id", "user/plum"]


def _with_figures_of_another_model(folder: Path) -> list[str]:
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    (folder.parent / "metrics.json").write_text(json.dumps({"overall": {}, "run": {"model_fingerprint": "another"}}))
    return ["model", str(folder), "--repo_id", "user/plum", "--metrics", str(folder.parent / "metrics.json")]


def _with_a_benchmark_alone(folder: Path) -> list[str]:
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return ["model", str(folder), "--repo_id", "user/plum", "--benchmark", "user/partonomy"]


def _without_records(folder: Path) -> list[str]:
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return ["dataset", str(folder), "--repo_id", "user/partonomy"]


def _of_another_name(folder: Path) -> list[str]:
    (folder / "partonomy_masks.py").write_text("")
    return ["metrics", str(folder), "--repo_id", "user/masks"]


def _with_an_app_that_fails(folder: Path) -> list[str]:
    (folder / "README.md").write_text("---\nsdk: gradio\n---\n")
    (folder / "app.py").write_text("import no_such_package\n")
    return ["space", str(folder), "--repo_id", "user/demo"]


@pytest.mark.parametrize(
    "make, message",
    [
        (_lacking_a_tensor, "needs .* parameters, but the weights contain"),
        (_with_figures_of_another_model, "The metrics are not those of .*mine"),
        (_with_a_benchmark_alone, "--benchmark names where the results of --metrics belong"),
        (_without_records, "mine/README.md names no configs"),
        (_of_another_name, "looks for masks.py, which .*mine does not hold"),
        (_with_an_app_that_fails, "mine/app.py does not start: ModuleNotFoundError: .*no_such_package"),
    ],
)
def test_a_folder_that_does_not_load_is_refused_with_its_name(make, message, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(SystemExit, match=f"Not pushed: .*{message}"):
        main(make(folder))


def test_checkpoints_optimizer_states_and_notes_stay_at_home_and_are_listed(tmp_path):
    folder, staged = tmp_path / "run", tmp_path / "staged"
    for name in ("checkpoint-4/modeling_plum.py", "checkpoint-4/optimizer.pt", "training_args.bin", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("123")
    for name in ("config.json", "model.safetensors", "modeling_plum.py"):
        (folder / name).write_text("{}")
    staged.mkdir()
    others = stage(folder, staged, MODEL_FILES)
    pushed = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
    assert pushed == ["config.json", "model.safetensors", "modeling_plum.py"]
    assert describe_left_out(others, folder) == [
        "left out: checkpoint-4/ (6 bytes)",
        "left out: notes.txt (3 bytes)",
        "left out: training_args.bin (3 bytes)",
    ]
