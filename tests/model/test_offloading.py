"""Models whose weights do not fit: offloaded to disk they answer, tag, segment and score as whole ones."""

import pytest
import torch
from torch.testing import assert_close

from modeling_plum import PlumForConditionalGeneration
from processing_plum import PlumPipeline, PlumProcessor
from tests.tiny import conversation, mixed_conversations, random_image, tiny_model, tiny_processor
from tests.tiny_backbones import llava_clip, qwen2_5_vl, tiny_sam

EXACT = {"rtol": 1e-5, "atol": 1e-5}
PARTS = ("vlm", "sam", "span_tagger", "span_projector", "mask_feedback")
PROMPTS = [conversation(random_image(seed=1), None), conversation(random_image(90, 40, seed=2), None)]


def tied(_):
    model = tiny_model()
    model.config.vlm_config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = True
    return PlumForConditionalGeneration(model.config).eval(), tiny_processor()


def composed(family):
    def build(folder):
        vlm, sam = str(family(folder / "vlm")), str(tiny_sam(folder / "sam"))
        options = {"span_tagger_num_heads": 4, "span_tagger_intermediate_size": 64}
        model = PlumForConditionalGeneration.from_backbones(vlm=vlm, sam=sam, **options)
        return model, PlumProcessor.from_backbones(vlm=vlm, sam=sam)

    return build


MODELS = {
    "shared_vision": lambda _: (tiny_model(), tiny_processor()),
    "tied_embeddings": tied,
    "llava": composed(llava_clip),
    "qwen": composed(qwen2_5_vl),
}


@pytest.fixture(scope="module", params=MODELS)
def plum(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plum")
    model, processor = MODELS[request.param](folder)
    model.save_pretrained(folder / "saved")
    return model, processor, folder / "saved"


def everything(model, processor) -> list:
    """What a model makes of prompts, of given answers alone and with given masks, points and boxes, and of choices."""
    options = {"tokenize": True, "return_dict": True}
    prompts = processor.apply_chat_template(PROMPTS, add_generation_prompt=True, padding_side="left", **options)
    conversations, masks = mixed_conversations()
    given = processor.apply_chat_template(conversations, masks=masks, **options)
    results = [model.segment(**prompts.to(model.device), max_new_tokens=4, do_sample=False)]
    results += [model.segment_spans(**given), model.segment_spans(**given, given_masks={0: masks[0][0]})]
    prompted = {"input_points": {0: [[9, 4]]}, "input_labels": {0: [1]}, "input_boxes": {3: [2, 3, 30, 40]}}
    results.append(model.segment_spans(**given, **prompted, input_masks={0: masks[0][0]}))
    with torch.no_grad():
        forward = model(**given)
    states = model.encode_conversations(**given)
    real = given["attention_mask"].bool()
    scores = model.score_choices(**given, num_choices=2)
    tensors = [scores, states[real], forward.loss, forward.pred_masks]
    for result in results:
        tensors += [result.sequences, result.spans, result.pred_masks, result.iou_scores, result.tag_scores]
    return tensors


@pytest.fixture(scope="module")
def expected(plum):
    return everything(*plum[:2])


@pytest.mark.parametrize("offloaded", [PARTS, PARTS[:1], PARTS[1:2], PARTS[2:]], ids="+".join)
def test_parts_on_the_disk_compute_what_they_do_in_memory(plum, expected, offloaded, tmp_path):
    _, processor, folder = plum
    device_map = {part: "disk" if part in offloaded else "cpu" for part in PARTS}
    loaded = PlumForConditionalGeneration.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in loaded.parameters())
    assert loaded.device.type == "cpu"
    assert_close(everything(loaded.eval(), processor), expected, **EXACT)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.95])
def test_a_model_that_does_not_fit_its_budget_computes_what_the_whole_one_does(plum, expected, share, tmp_path):
    model, processor, folder = plum
    size = sum(parameter.nbytes for parameter in model.parameters())
    loaded = PlumForConditionalGeneration.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": int(share * size)}, offload_folder=tmp_path
    )
    assert any(parameter.is_meta for parameter in loaded.parameters())
    assert_close(everything(loaded.eval(), processor), expected, **EXACT)


def test_the_pipeline_answers_with_a_model_half_of_which_is_on_the_disk(plum, tmp_path):
    model, processor, folder = plum
    loaded = PlumForConditionalGeneration.from_pretrained(
        folder, device_map={"vlm": "cpu", **dict.fromkeys(PARTS[1:], "disk")}, offload_folder=tmp_path
    )
    question = {"image": random_image(seed=1), "text": "Which parts can you see?"}
    found, expected = (PlumPipeline(m, processor=processor)(question, max_new_tokens=6) for m in (loaded, model))
    assert found["generated_text"] == expected["generated_text"]
    assert len(found["segments"]) == len(expected["segments"])
