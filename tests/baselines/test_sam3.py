import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, Sam2Config

from plum_partonomy.baselines.sam3 import Sam3
from plum_partonomy.masks import DataError
from tests.baselines.tiny_models import SIDE, make_question, tiny_sam3
from tests.tiny import random_image

PARTS = ["wheel", "left wing", "tail"]
THRESHOLD = 0.26


@pytest.fixture(scope="module")
def pretrained():
    return tiny_sam3()


@torch.no_grad()
def naive_masks(model, tokenizer, image, words: str) -> tuple[np.ndarray, float]:
    """One prompt in one forward pass of the whole model, its instances united one by one."""
    pixels = torch.tensor(np.asarray(image.resize((SIDE, SIDE), 2)), dtype=torch.float32)
    pixels = ((pixels / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
    tokens = tokenizer([words], padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    outputs = model(pixel_values=pixels, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    mask, best = np.zeros((image.height, image.width), dtype=bool), 0.0
    for logits, score in zip(outputs.pred_masks[0], outputs.pred_logits[0], strict=True):
        confidence = float(score.sigmoid() * outputs.presence_logits[0, 0].sigmoid())
        best = max(best, confidence)
        if confidence > THRESHOLD:
            whole = torch.nn.functional.interpolate(logits.sigmoid()[None, None], mask.shape, mode="bilinear")
            mask |= whole[0, 0].numpy() > 0.5
    return mask, best


@pytest.mark.parametrize(("prompt", "ending"), [("part", ""), ("part_of_object", " of the plane")])
def test_masks_are_those_of_one_forward_pass_for_each_prompt(pretrained, prompt, ending):
    model, tokenizer = pretrained
    sam3, image = Sam3(model, tokenizer, threshold=THRESHOLD, prompt=prompt), random_image(60, 84)
    seen, question = sam3.encode(image), make_question(image_label="plane")
    found = sam3.segment(seen, question, PARTS)
    expected = [naive_masks(model, tokenizer, image, part + ending) for part in PARTS]
    for (mask, score), (true, best) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mask, true)
        assert score == pytest.approx(best, rel=1e-4)
    assert len({mask.tobytes() for mask, _ in found}) == len(PARTS)  # the words matter
    again = sam3.segment(seen, question, PARTS[::-1])
    assert [mask is other for (mask, _), (other, _) in zip(again, found[::-1], strict=True)] == [True] * 3


def test_a_part_without_an_instance_has_an_empty_mask(pretrained):
    sam3 = Sam3(*pretrained, threshold=1.0)
    ((mask, score),) = sam3.segment(sam3.encode(random_image(60, 84)), make_question(), ["wheel"])
    assert mask.shape == (60, 84) and not mask.any() and 0 < score < 1


def test_a_sam_without_text_prompts_is_refused(tmp_path):
    Sam2Config().save_pretrained(tmp_path)
    with pytest.raises(DataError, match="expected a SAM 3 that takes text prompts .*found 'sam2'; use facebook/sam3"):
        Sam3.from_pretrained(tmp_path)
    CLIPTextConfig().save_pretrained(tmp_path)
    with pytest.raises(DataError, match="found 'clip_text_model'"):
        Sam3.from_pretrained(tmp_path)
