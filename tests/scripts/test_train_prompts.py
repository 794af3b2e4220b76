"""Training for clicks with features computed once: the losses of `forward`, and only the masks change."""

import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from modeling_plum import PlumForConditionalGeneration
from plum_partonomy.inference.checkpoint import load_checkpoint
from plum_partonomy.training.examples import OF_SPANS, Collator, ConversationDataset
from plum_partonomy.training.mixture import load_records, parse_source
from scripts.train_prompts import compute_loss, draw, encode_examples, load_batches, main
from tests.runs import ROOT, make_records, record

CHECKPOINT = ROOT / "checkpoints" / "plum-tiny"
SHORT = [str(ROOT / "recipes" / "clicks_plum_tiny.yaml"), "--mixture", '{"name": "mini_instances"}', "--batches", "1"]
SHORT += ["--max_steps", "2", "--per_device_train_batch_size", "2", "--fresh_records", "false", "--output_dir"]


def test_the_losses_are_those_of_a_forward_pass():
    model, processor = load_checkpoint(CHECKPOINT)
    defaults = {"dataset": "partonomy", "name": None, "data_dir": None}
    records = load_records(parse_source({"name": "mini_instances"}, defaults), "validation")
    dataset, collator = ConversationDataset(records), Collator(processor, order_free_targets=True)
    torch.manual_seed(0)
    (batch,) = encode_examples(model.eval(), dataset, collator, batches=1, batch_size=3)
    torch.manual_seed(0)
    whole = collator([dataset[i] for i in torch.randperm(len(dataset)).tolist()[:3]])
    for name in ("record_ids", "record_counts", "record_index", *OF_SPANS):
        del whole[name]
    drawn = draw(batch["spans"], 0.5)
    with torch.no_grad():
        loss, figures = compute_loss(model, batch, **drawn)
        losses = model(**whole, **drawn).losses
    weights = {name: weight for name, weight in model.loss_weights.items() if name.startswith("mask_")}
    assert_close(loss, sum(weight * losses[name] for name, weight in weights.items()))
    assert 0 < figures["own"] <= 1 and 0 < figures["prompted"] <= 1


def test_answers_stay_and_masks_change(tmp_path):
    output = tmp_path / "run"
    main([*SHORT, str(output)])
    before, after = (PlumForConditionalGeneration.from_pretrained(folder) for folder in (CHECKPOINT, output))
    changed = set()
    for name, weight in before.named_parameters():
        if not torch.equal(weight.float(), after.get_parameter(name).float()):
            changed.add(".".join(name.split(".")[: 2 if name.startswith("sam") else 1]))
    assert changed == {"sam.mask_decoder", "sam.prompt_encoder", "mask_feedback", "span_projector"}
    assert len(json.loads((output / "history.json").read_text())) == 2


def test_weights_are_a_mean_of_those_before_and_after(tmp_path):
    for keep in ("0", "0.25", "1"):
        main([*SHORT, str(tmp_path / keep), "--keep", keep])
    name = "sam.prompt_encoder.point_embed.1.weight"
    models = [PlumForConditionalGeneration.from_pretrained(tmp_path / keep) for keep in ("0", "0.25", "1")]
    after, mixed, before = (model.get_parameter(name) for model in models)
    assert_close(mixed, 0.75 * after + 0.25 * before)
    assert torch.equal(before, PlumForConditionalGeneration.from_pretrained(CHECKPOINT).get_parameter(name).float())


@pytest.mark.parametrize("workers", [0, 1])
def test_each_pass_over_the_records_is_an_epoch_of_the_data_set(workers):
    dataset = ConversationDataset(make_records([record(number, 1) for number in range(3)]), seed=1, jitter=0.2)
    torch.manual_seed(0)
    batches = list(load_batches(dataset, list, 4, 2, workers))
    assert [len(batch) for batch in batches] == [2, 1, 2, 1]
    for epoch, passed in enumerate((batches[:2], batches[2:])):
        dataset.set_epoch(epoch)
        expected = {example["id"]: np.asarray(example["image"]) for example in map(dataset.__getitem__, range(3))}
        found = {example["id"]: np.asarray(example["image"]) for batch in passed for example in batch}
        assert found.keys() == expected.keys() and all(np.array_equal(found[key], expected[key]) for key in found)
