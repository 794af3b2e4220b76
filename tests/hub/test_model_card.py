"""Cards say what the folders say, in the form that huggingface_hub accepts."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from plum_partonomy.hub.model_card import FIGURES, make_model_card, write_recipe
from plum_partonomy.scoring.corrections import METRICS
from plum_partonomy.training.options import parse_arguments, read_options
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
RUN = {
    "dataset": "partonomy",
    "name": "mini_questions",
    "split": "test",
    "command": "python evaluate_plum.py",
    "date": "d",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def test_the_figures_of_metrics_json_stand_in_the_metadata_and_in_the_table(folder):
    overall = {"n": 884, "choice_accuracy": 0.25, "choice_accuracy_random": 0.2, "strict_macro_giou": 0.5}
    card = make_model_card(folder, repo_id="user/plum", metrics={"overall": overall, "run": RUN})
    again = ModelCard(str(card))  # raises on a model-index that is not valid
    results = {result.metric_type: result for result in again.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "choice_accuracy": 0.25,
        "strict_macro_giou": 0.5,
    }
    assert results["choice_accuracy"].dataset_config == "mini_questions" and again.data.model_name == "plum"
    assert "| choice accuracy | 0.250 | - | - | 0.200 |\n" in again.text and "884 questions" in again.text
    assert FIGURES["end_to_end_giou"] not in again.text, "it was not measured"


def test_further_evaluations_and_the_calibration_have_tables_and_a_sentence(folder):
    run = {
        **RUN,
        "name": "mini_instances",
        "task": "correction",
        "command": "python evaluate_plum.py --task correction",
    }
    corrections = {name: 0.5 for name in METRICS} | {"n": 9, "repeat_overlap": None}
    limits = {"overall": {name: [0.25, 0.75] for name in METRICS}}
    hard = {"overall": {"n": 5, "choice_accuracy": 0.75}, "run": {**RUN, "name": "mini_hard_questions"}}
    further = [hard, {"overall": corrections, "intervals": limits, "run": run}]
    path = folder / "config.json"
    known = {"auroc": 0.97, "known_accepted": 0.98, "other_rejected": 1.0, "kinds": "birds"}
    known["images"] = {"known": 30, "other": 40}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_statistics": known}))
    card = make_model_card(folder, metrics={"overall": {"n": 1, "span_f1": 1.0}, "run": RUN}, further=further)
    assert "`mini_hard_questions`, split `test`, 5 questions:" in card.text
    assert "| choice accuracy | 0.750 | - | - | - |" in card.text
    assert f"| `matched_iou`: {METRICS['matched_iou']} | 0.500 | 0.250 to 0.750 |" in card.text
    assert "| `repeat_overlap`" not in card.text and "`python evaluate_plum.py --task correction`" in card.text
    assert "(birds). On test images its AUROC against images of other kinds is\n0.970" in card.text
    assert "accepts 0.980 of\n30 known images and rejects 1.000 of\n40 others" in card.text


def test_a_model_from_scratch_has_the_licence_of_its_drawings_and_no_base_model(folder):
    write_recipe(folder, {"dataset": "partonomy", "name": "mini", "model_config": {}, "max_steps": 3})
    card = ModelCard(str(make_model_card(folder)))
    assert card.data.license == "apache-2.0" and card.data.base_model is None
    assert card.data.pipeline_tag == "image-text-to-text" and card.data.library_name == "transformers"
    assert "about photographs are meaningless" in card.text and "max_steps: 3" in card.text


def test_a_model_of_backbones_names_them_and_does_not_guess_its_licence(folder):
    write_recipe(folder, {"vlm": "llava-hf/llava-1.5-7b-hf", "sam": "facebook/sam-vit-huge", "name": "descriptor"})
    card = ModelCard(str(make_model_card(folder)))
    assert card.data.base_model == ["llava-hf/llava-1.5-7b-hf", "facebook/sam-vit-huge"]
    assert card.data.license is None and make_model_card(folder, license="llama2").data.license == "llama2"
    assert "photographs" not in card.text


def test_a_mixture_with_photographs_has_no_known_licence(folder):
    write_recipe(
        folder, {"model_config": {}, "mixture": [{"name": "mini"}, {"name": "paco_lvis", "data_dir": "/home"}]}
    )
    card = ModelCard(str(make_model_card(folder)))
    assert card.data.license is None and "photographs" not in card.text and "/home" not in card.text


def test_a_folder_that_says_nothing_gets_a_card_that_claims_nothing(folder):
    card = ModelCard(str(make_model_card(folder)))
    assert card.data.license is None and card.data.eval_results is None
    assert "Not measured" in card.text and "no information about its training" in card.text


def test_a_recipe_holds_the_options_of_a_command_line_but_no_places_or_token(tmp_path):
    recipe = ROOT / "recipes" / "plum_tiny.yaml"
    argv = [
        str(recipe),
        "--output_dir",
        str(tmp_path),
        "--max_steps=7",
        "--no_dataloader_pin_memory",
        "--hub_token",
        "hf_secret",
        "--bf16",
        "false",
    ]
    argv += ["--model_config", json.dumps({"mask_feedback": False}), "--frozen_modules", "sam", "vlm"]
    argv += ["--mixture", json.dumps({"name": "mini_instances", "rate": 2})]
    write_recipe(tmp_path, read_options(argv))
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert not {"output_dir", "hub_token"} & written.keys() and written["model_config"] == {"mask_feedback": False}
    again = parse_arguments([str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path)])
    for ours, theirs in zip(again, parse_arguments(argv), strict=True):
        differing = {name for name, value in vars(ours).items() if value != vars(theirs)[name]}
        assert differing <= {"hub_token", "distributed_state", "deepspeed_plugin"}, differing


def test_the_table_has_intervals_and_the_text_the_protocol_and_no_place_on_a_disk(folder):
    run = RUN | {"command": f"python /home/me/evaluate_plum.py --model {folder}", "protocol": {"name": "published"}}
    overall = {"n": 8, "photographs": 4, "objects": 3, "span_f1": 0.5}
    metrics = {"overall": overall, "run": run, "intervals": {"overall": {"span_f1": [0.25, 0.75]}}}
    text = make_model_card(folder, metrics=metrics).text
    assert "8 questions about 4 images of 3 objects" in text and "Protocol: published." in text
    assert "| span tags, F1 | 0.500 | 0.250 to 0.750 | - | - |" in text
    assert "`python evaluate_plum.py --model mine`" in text
    assert str(folder.parent) not in text and "/home" not in text


@pytest.mark.parametrize(
    ("keeps_best", "sentence"),
    [(True, "of step 2, the best evaluation: span_f1 0.900"), (False, "at the last evaluation: span_f1 0.500")],
)
def test_the_metrics_of_a_training_are_those_of_the_weights_that_were_kept(folder, keeps_best, sentence):
    log = [{"step": 2, "eval_span_f1": 0.9}, {"step": 4, "eval_span_f1": 0.5}]
    state = {"log_history": log, "global_step": 4, "epoch": 1.0, "best_global_step": 2}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    write_recipe(folder, {"name": "mini", "load_best_model_at_end": keeps_best})
    assert sentence in make_model_card(folder).text
