"""The command that compares PLUM with parts of it taken out: what it measures, and what it does not do twice."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from plum_partonomy.training.model import build_from_scratch
from scripts.run_ablations import (
    FIGURES,
    PERPLEXITIES,
    VARIANTS,
    build_untrained,
    format_table,
    measure_perplexity,
    run,
    write_recipe,
)
from tests.runs import make_records, record
from tests.tiny import conversation, tiny_model, tiny_processor

RECIPE = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "plum_tiny.yaml").read_text())


@pytest.fixture(scope="module")
def records():
    return make_records([record(number, number % 4) for number in range(8)])


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


def test_the_variants_are_the_recipes_of_the_folder():
    assert {"tags-forced", "tags-own-listed", "seg-off"} < set(VARIANTS) and len(VARIANTS) == 9


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_leaves_out_what_it_says_and_keeps_the_vocabulary(variant, tmp_path):
    recipe = yaml.safe_load(write_recipe(tmp_path, RECIPE, variant=variant, seed=1).read_text())
    assert (recipe["seed"], recipe["max_steps"]) == (1, RECIPE["max_steps"])
    assert (recipe["teacher_forcing_probability"] > 0) == ("forced" in variant)
    assert recipe["order_free_targets"] != variant.endswith("-listed")
    text = "It has a left wing, a tail and a wheel."
    model, processor = build_from_scratch(recipe["model_config"], 300, [text])
    assert (not list(model.span_tagger.parameters())) == (processor.seg_token is not None) == variant.startswith("seg")
    assert (model.mask_feedback is None) == ("off" in variant)
    plain, _ = build_from_scratch(RECIPE["model_config"], 300, [text])
    more = model.get_input_embeddings().num_embeddings - plain.get_input_embeddings().num_embeddings
    assert more == variant.startswith("seg")


def test_a_run_of_other_options_is_refused(tmp_path):
    write_recipe(tmp_path, RECIPE, variant="tags-own", seed=0)
    write_recipe(tmp_path, RECIPE, variant="tags-own", seed=0)
    with pytest.raises(SystemExit, match="was run with other options"):
        write_recipe(tmp_path, RECIPE | {"max_steps": 20}, variant="tags-own", seed=0)


def test_a_finished_run_is_not_made_again(tmp_path):
    figures = {name: index / 10 for index, name in enumerate(FIGURES)}
    contents = {
        "model/trainer_state.json": {},
        "questions/metrics.json": {"overall": figures | {"n": 7}},
        "corrections/metrics.json": {"overall": figures},
        "perplexity.json": {name: figures[name] for name in PERPLEXITIES},
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    assert run(tmp_path, tmp_path / "there_is_no_recipe.yaml") == figures


def test_the_table_gives_the_mean_and_the_extremes_and_a_dash_where_nothing_is_measured():
    table = format_table({"seg-off": [{"strict_macro_giou": value} for value in (0.25, 0.5, 0.75)]}).splitlines()
    assert len(table) == 3
    cells = [cell.strip() for cell in table[2].strip("|").split("|")]
    assert cells == ["`seg-off`", "0.500 (0.250 to 0.750)", *["-"] * (len(FIGURES) - 1)]
