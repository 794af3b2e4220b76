"""The command that compares PLUM with parts of it taken out: what it measures, and what it does not do twice."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from partkit.masks import decode
from scripts.run_ablations import (
    FIGURES,
    VARIANTS,
    build_untrained,
    format_table,
    measure_masks,
    measure_perplexity,
    run,
    write_recipe,
)
from tests.tiny import conversation, tiny_model, tiny_processor
from tests.training import make_records, record
from train import build_from_scratch

RECIPE = yaml.safe_load((Path(__file__).parents[1] / "recipes" / "plum_tiny.yaml").read_text())


@pytest.fixture(scope="module")
def records():
    return make_records([record(number, number % 4) for number in range(8)])


def iou_turn_by_turn(model, processor, records, given: bool) -> list[list[list[float]]]:
    """The IoU of every span by record and turn, one span at a time, each after the true earlier masks if `given`."""
    found = []
    for row in records:
        masks = [decode(mask["rle"]).astype(bool) for mask in row["masks"]]
        turns = []
        for question, answer in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            count = answer["content"].count("<p>")
            true, masks = masks[:count], masks[count:]
            chat = conversation(row["image"], answer["content"], question=question["content"])
            batch = processor.apply_chat_template([chat], tokenize=True, return_dict=True)
            ious = []
            for i in range(count):
                earlier = {j: torch.from_numpy(true[j]) for j in range(i)} if given else {}
                (segmented,) = processor.post_process_segmentation(model.segment(**batch, given_masks=earlier))
                mask = segmented.spans[i].mask
                ious.append((mask & true[i]).sum() / (mask | true[i]).sum())
            turns.append(ious)
        found.append(turns)
    return found


@pytest.mark.parametrize("feedback", [True, False])
def test_mask_figures_equal_those_of_segmenting_one_span_at_a_time(records, feedback):
    model, processor = tiny_model(mask_feedback=feedback), tiny_processor()
    if feedback:  # at its small initial weights it would change nothing
        torch.nn.init.normal_(model.mask_feedback.out_proj.weight, std=1.0)
    figures = measure_masks(model, processor, records)
    for suffix, given in (("", False), ("_given", True)):
        ious = iou_turn_by_turn(model, processor, records, given)
        by_record = [np.mean(sum(turns, [])) for turns in ious if any(turns)]
        later = [iou for turns in ious for turn in turns for iou in turn[1:]]
        assert figures[f"giou{suffix}"] == pytest.approx(np.mean(by_record), rel=1e-5)
        assert figures[f"later_iou{suffix}"] == pytest.approx(np.mean(later), rel=1e-5)
    assert (figures["giou"] != figures["giou_given"]) == feedback


def test_perplexity_is_that_of_the_answers_without_tags_and_images(records):
    model, processor = tiny_model(), tiny_processor()
    losses = []
    for messages in records["messages"]:
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            plain = answer["content"].replace("<p>", "").replace("</p>", "")
            chat = conversation(None, plain, question=question["content"])
            batch = processor.apply_chat_template([chat], tokenize=True, return_dict=True)
            with torch.no_grad():
                logits = model(batch["input_ids"]).logits[0, :-1]
            loss = F.cross_entropy(logits, batch["labels"][0, 1:], ignore_index=-100, reduction="none")
            losses += loss[batch["labels"][0, 1:] != -100].tolist()
    expected = math.exp(sum(losses) / len(losses))
    assert measure_perplexity(model, processor, records) == pytest.approx(expected, rel=1e-4)


def test_the_weights_before_the_training_depend_on_the_seed_alone(records):
    processor, config = tiny_processor(), tiny_model().config
    perplexities = []
    for seed in (1, 1, 2):
        torch.rand(seed)  # whatever was drawn before
        perplexities.append(measure_perplexity(build_untrained(config, seed=seed), processor, records))
    assert perplexities[0] == perplexities[1] != perplexities[2]


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_leaves_out_what_it_says_and_keeps_the_vocabulary(variant, tmp_path):
    path = write_recipe(tmp_path, RECIPE, dataset="mini", variant=variant, seed=1)
    recipe = yaml.safe_load(path.read_text())
    assert (recipe["name"], recipe["seed"], recipe["max_steps"]) == ("mini", 1, RECIPE["max_steps"])
    text = "It has a left wing, a tail and a wheel."
    model, processor = build_from_scratch(recipe["model_config"], 300, [text])
    assert (model.span_tagger is None) == (processor.seg_token is not None) == variant.startswith("seg")
    assert (model.mask_feedback is None) == variant.endswith("no_feedback")
    plain, _ = build_from_scratch(RECIPE["model_config"], 300, [text])
    more = model.get_input_embeddings().num_embeddings - plain.get_input_embeddings().num_embeddings
    assert more == variant.startswith("seg")


def test_a_run_of_other_options_is_refused(tmp_path):
    write_recipe(tmp_path, RECIPE, dataset="mini", variant="tags", seed=0)
    write_recipe(tmp_path, RECIPE, dataset="mini", variant="tags", seed=0)
    with pytest.raises(SystemExit, match="was run with other options"):
        write_recipe(tmp_path, RECIPE | {"max_steps": 20}, dataset="mini", variant="tags", seed=0)


def test_a_finished_run_is_not_made_again(tmp_path):
    contents = {
        "model/trainer_state.json": {},
        "evaluation/metrics.json": {"overall": {"choice_accuracy": 0.25, "end_to_end_giou": 0.5, "n": 7}},
        "figures.json": {"giou": 0.75},
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    found = run(tmp_path, tmp_path / "there_is_no_recipe.yaml", dataset="mini")
    assert found == {"giou": 0.75, "choice_accuracy": 0.25, "end_to_end_giou": 0.5}


def test_the_table_gives_the_mean_and_the_extremes_and_a_dash_where_nothing_is_measured():
    table = format_table({("mini", "seg"): [{"giou": 0.25}, {"giou": 0.5}, {"giou": 0.75}]}).splitlines()
    assert len(table) == 3
    cells = [cell.strip() for cell in table[2].strip("|").split("|")]
    assert cells == ["`mini`", "`seg`", "0.500 (0.250 to 0.750)", *["-"] * (len(FIGURES) - 1)]
