"""The baseline with a special token after each grounded phrase in place of the span tagger."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from torch.testing import assert_close

from chats_plum import PlainChat, find_last_phrase, insert_seg_tokens
from modeling_plum import PlumForConditionalGeneration
from modules_plum import dice_loss
from plum_partonomy.evaluation.partonomy import evaluate
from plum_partonomy.inference.checkpoint import load_checkpoint
from plum_partonomy.scoring.predictions import read_predictions
from plum_partonomy.training.model import SEG_TOKEN, add_lora, check_span_source
from plum_partonomy.training.options import ModelArguments
from plum_partonomy.training.run import main as train
from processing_plum import PlumProcessor
from segmenters_plum import upscale_masks
from tests.evaluation.test_evaluate_plum import arguments, question_set  # noqa: F401
from tests.runs import base_options
from tests.tiny import conversation, random_image, random_mask, tiny_config, tiny_model, tiny_processor

ANSWER = "It has a <p>left wing</p>, a <p>tail</p> and a <p>wheel</p>."
PLAIN_ANSWER = "It has a left wing, a tail and a wheel."
EXACT = {"rtol": 1e-4, "atol": 1e-5}


def seg_processor(tokenizer_kind: str = "byte_level") -> PlumProcessor:
    plain = tiny_processor(tokenizer_kind=tokenizer_kind)
    plain.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "[SEG]"]})
    return PlumProcessor(
        plain.image_processor,
        plain.sam_image_processor,
        plain.tokenizer,
        num_image_tokens=plain.num_image_tokens,
        vlm_image_input=plain.vlm_image_input,
        seg_token="[SEG]",
    )


def seg_model(processor: PlumProcessor, **options) -> PlumForConditionalGeneration:
    seg_token_id = processor.tokenizer.convert_tokens_to_ids("[SEG]")
    return tiny_model(span_source="seg_token", seg_token_id=seg_token_id, **options)


def encode(processor, chats, **options):
    return processor.apply_chat_template(chats, tokenize=True, return_dict=True, **options)


# ------------------------------------------------------------------------------------------------ processor


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "wordpiece"])
def test_each_tagged_phrase_is_followed_by_the_token_which_is_its_span(kind):
    processor = seg_processor(kind)
    chat = conversation(random_image(), ANSWER) + conversation(None, "A <p>tail</p>", question="And what else?")
    batch = encode(processor, [chat], masks=[[random_mask(seed=seed) for seed in range(4)]])
    ids, seg_id = batch["input_ids"][0], processor.tokenizer.convert_tokens_to_ids("[SEG]")
    positions = (ids == seg_id).nonzero()[:, 0].tolist()
    assert batch["spans"].tolist() == [[0, position, position + 1] for position in positions]
    before = [processor.tokenizer.decode(ids[:position]).replace(" ", "") for position in positions]
    assert [text.endswith(part) for text, part in zip(before, ("leftwing", "tail", "wheel", "tail"), strict=True)]
    # The model learns to write the token, so it is a target like any other word of the answer.
    assert (batch["labels"][0, positions] == seg_id).all()
    assert (batch["span_labels"] == 1).nonzero().tolist() == [[0, position] for position in positions]


def test_answers_keep_their_ranges_around_the_tokens_that_are_put_in():
    chat = PlainChat("Q: a wing? A: a wing E. Q: tail? A: tail", [(14, 20), (36, 40)], [(16, 20), (36, 40)])
    inserted = insert_seg_tokens(chat, "[SEG]")
    assert [inserted.text[start:end] for start, end in inserted.answers] == ["a wing[SEG]", "tail[SEG]"]
    assert [inserted.text[start:end] for start, end in inserted.spans] == ["[SEG]", "[SEG]"]
    assert inserted.text.replace("[SEG]", "") == chat.text


def test_the_token_in_a_users_text_is_refused():
    with pytest.raises(ValueError, match="the text contains '\\[SEG\\]'"):
        encode(seg_processor(), [conversation(random_image(), None, question="What is [SEG]?")])


def test_a_token_that_the_tokenizer_does_not_have_is_refused():
    plain = tiny_processor()
    with pytest.raises(ValueError, match="no special token '\\[SEG\\]'"):
        PlumProcessor(plain.image_processor, plain.sam_image_processor, plain.tokenizer, seg_token="[SEG]")


@pytest.mark.parametrize(
    "text, phrase",
    [
        ("It has the following visible parts: left wing", "left wing"),
        ("left wing, and tail fin", "tail fin"),
        ("I can see a wheel and another wheel", "wheel"),
        ("The hull", "hull"),
        ("landing gear", "landing gear"),
        ("a wing, ", ""),
    ],
)
def test_the_last_phrase_of_a_text_starts_after_the_last_separator(text, phrase):
    assert text[find_last_phrase(text) :] == phrase


def test_returned_texts_are_without_the_token_and_spans_are_the_phrases_before_it():
    processor = seg_processor()
    model = seg_model(processor)
    batch = encode(processor, [conversation(random_image(), ANSWER)])
    spans = batch.pop("spans")
    (answer,) = processor.post_process_segmentation(model.segment_answers(**batch))
    assert answer.text == PLAIN_ANSWER
    assert [span.text for span in answer.spans] == ["left wing", "tail", "wheel"]
    assert [PLAIN_ANSWER[span.start : span.end] for span in answer.spans] == ["left wing", "tail", "wheel"]
    (forced,) = processor.post_process_segmentation(model.segment_spans(**batch, spans=spans))
    for found, expected in zip(answer.spans, forced.spans, strict=True):
        assert np.array_equal(found.mask, expected.mask) and found.score == expected.score


# ------------------------------------------------------------------------------------------------ model


def test_the_training_forward_equals_one_written_out_by_hand():
    processor = seg_processor()
    model = seg_model(processor, mask_feedback=False, mask_overlap_loss="dice")
    masks = [[random_mask(seed=seed) for seed in range(3)]]
    batch = encode(processor, [conversation(random_image(), ANSWER)], masks=masks)
    with torch.no_grad():
        outputs = model(**batch)
        # The language model, and the states at the special tokens alone.
        image = model.get_image_embeddings(batch["sam_pixel_values"])
        features = model.vlm.model.get_image_features(image, return_dict=True).pooler_output[0]
        embeddings = model.get_input_embeddings()(batch["input_ids"])
        embeddings[batch["input_ids"] == processor.image_token_id] = features
        states = model.vlm.model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).last_hidden_state
        seg_id = processor.tokenizer.convert_tokens_to_ids("[SEG]")
        queries = model.span_projector(states[batch["input_ids"] == seg_id])
        dense = model.sam.prompt_encoder.no_mask_embed.weight[..., None, None].expand(1, -1, 8, 8)
        decoded = [
            model.sam.mask_decoder(
                image,
                image_positional_embeddings=model.sam.get_image_wide_positional_embeddings(),
                sparse_prompt_embeddings=query[None, None, None],
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
            for query in queries
        ]
        low_res = torch.stack([mask[0, 0, 0] for mask, _ in decoded])
        targets = torch.stack(batch["mask_labels"]).float()
        logits = upscale_masks(low_res, 64, batch["reshaped_input_sizes"][0].tolist(), targets.shape[1:])
        word_loss = F.cross_entropy(
            model.get_output_embeddings()(states)[0, :-1], batch["labels"][0, 1:], ignore_index=-100
        )
    assert_close(outputs.pred_masks, low_res, **EXACT)
    assert set(outputs.losses) == {"language_modeling", "mask_overlap", "mask_bce", "mask_iou"}
    assert_close(outputs.losses["language_modeling"], word_loss, **EXACT)
    assert_close(outputs.losses["mask_overlap"], dice_loss(logits, targets).mean(), **EXACT)
    assert_close(outputs.losses["mask_bce"], F.binary_cross_entropy_with_logits(logits, targets), **EXACT)
    config = model.config
    weights = (1.0, config.mask_overlap_loss_weight, config.mask_bce_loss_weight, config.mask_iou_loss_weight)
    names = ("language_modeling", "mask_overlap", "mask_bce", "mask_iou")
    expected = sum(weight * outputs.losses[name] for weight, name in zip(weights, names, strict=True))
    assert_close(outputs.loss, expected)


def test_each_row_of_a_batch_equals_the_row_alone():
    processor = seg_processor()
    model = seg_model(processor)
    chats = [
        conversation(random_image(seed=1), ANSWER),
        conversation(random_image(90, 40, seed=2), "The <p>tail</p> is red."),
        conversation(None, "It is red."),
    ]
    together = model.segment_answers(**encode(processor, chats))
    alone = [model.segment_answers(**encode(processor, [chat])) for chat in chats[:2]]
    assert_close(together.pred_masks, torch.cat([output.pred_masks for output in alone]), **EXACT)
    assert together.spans[:, 0].tolist() == [0, 0, 0, 1]
    assert together.tag_scores.tolist() == [1.0] * 4


def test_generated_tokens_are_segmented_with_the_masks_of_the_same_answer_given():
    processor = seg_processor()
    model = seg_model(processor)
    seg_id = processor.tokenizer.convert_tokens_to_ids("[SEG]")
    prompts = encode(processor, [conversation(random_image(), None)], add_generation_prompt=True)
    with torch.no_grad():  # a head that writes the token first
        model.get_output_embeddings().weight[seg_id] = model(**prompts).last_hidden_state[0, -1]
    generated = model.segment(**prompts, max_new_tokens=4, do_sample=False)
    assert len(generated.spans) and (generated.sequences[0, generated.spans[:, 1]] == seg_id).all()
    labels = torch.where(generated.answer_mask, generated.sequences, -100)
    given = {**prompts, "input_ids": generated.sequences}
    given["attention_mask"] = torch.ones_like(generated.sequences)
    assert_close(model.segment_answers(**given, labels=labels).pred_masks, generated.pred_masks, **EXACT)
    (answer,) = processor.post_process_segmentation(generated)
    assert "[SEG]" not in answer.text


def test_a_saved_model_and_processor_give_the_same_masks_and_texts(tmp_path):
    processor = seg_processor()
    model = seg_model(processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = PlumForConditionalGeneration.from_pretrained(tmp_path).eval()
    loaded_processor = PlumProcessor.from_pretrained(tmp_path)
    assert not list(loaded.span_tagger.parameters()) and loaded_processor.seg_token == "[SEG]"
    chats = [conversation(random_image(), ANSWER)]
    expected = processor.post_process_segmentation(model.segment_spans(**encode(processor, chats)))[0]
    found = loaded_processor.post_process_segmentation(loaded.segment_spans(**encode(loaded_processor, chats)))[0]
    assert found.text == expected.text
    for one, other in zip(found.spans, expected.spans, strict=True):
        assert np.array_equal(one.mask, other.mask) and one.text == other.text
        assert one.score == pytest.approx(other.score, rel=1e-5)


# ------------------------------------------------------------------------------------------------ configuration


def test_an_unknown_span_source_is_refused():
    with pytest.raises(StrictDataclassFieldValidationError, match="expected one of .'tagger', 'seg_token'., got crf"):
        tiny_config(span_source="crf")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"span_source": "seg_token"}, "span_source is 'seg_token' but seg_token_id is None"),
        ({"seg_token_id": 5}, "span_source is 'tagger' but seg_token_id is 5"),
        ({"span_source": "seg_token", "seg_token_id": 400}, "seg_token_id is 400 but the language model has 400"),
    ],
)
def test_a_token_that_does_not_fit_the_span_source_is_refused(options, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny_config(**options)


# ------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def trained(data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seg") / "out"
    config = tiny_config().to_dict() | {"span_source": "seg_token", "seg_token_id": None}
    options = base_options(data_folder, folder) | {"tokenizer_vocab_size": 300, "max_steps": 4, "save_strategy": "no"}
    evaluated = {"eval_strategy": "steps", "eval_steps": 4}
    words = [word for name, value in (options | evaluated).items() for word in (f"--{name}", str(value))]
    train([*words, "--model_config", json.dumps(config)])
    return folder


def test_a_model_trained_from_scratch_has_the_token_and_no_tagger(trained):
    model, processor = load_checkpoint(trained)
    assert not list(model.span_tagger.parameters()) and processor.seg_token == SEG_TOKEN
    assert model.config.seg_token_id == processor.tokenizer.convert_tokens_to_ids(SEG_TOKEN)
    assert model.config.vlm_config.text_config.vocab_size == len(processor.tokenizer) == 301
    log = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    assert not any("span_tagging_loss" in entry for entry in log)
    assert any("mask_bce_loss" in entry for entry in log)


def test_a_trained_model_is_evaluated_like_any_other(trained, question_set, tmp_path):  # noqa: F811
    evaluate(arguments(trained, question_set, tmp_path / "evaluation"))
    predictions = read_predictions(tmp_path / "evaluation" / "predictions.jsonl")
    assert len(predictions) == 7
    for prediction in predictions:
        assert [span.text for span in prediction.given_spans] == ["left wing", "tail"]
        assert "[SEG]" not in prediction.generated_text
        assert prediction.true_tags == prediction.predicted_tags


def lora_arguments(*trained_whole):
    return ModelArguments(model="unused", lora_r=2, lora_trained_whole=list(trained_whole))


def test_lora_trains_of_the_embeddings_the_rows_of_the_token_alone():
    processor = seg_processor()
    model = seg_model(processor)
    before = {"in": model.get_input_embeddings().weight.clone(), "out": model.get_output_embeddings().weight.clone()}
    adapted = add_lora(model, lora_arguments("span_projector", "mask_decoder"))
    batch = encode(processor, [conversation(random_image(), ANSWER)], masks=[[random_mask(seed=i) for i in range(3)]])
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(**batch).loss.backward()
    optimizer.step()
    stepped = adapted.eval()(**batch).logits
    merged = adapted.merge_and_unload()
    after = {"in": merged.get_input_embeddings().weight, "out": merged.get_output_embeddings().weight}
    for name, weight in after.items():
        assert (weight != before[name]).any(dim=1).nonzero()[:, 0].tolist() == [model.config.seg_token_id], name
    assert_close(merged(**batch).logits, stepped, **EXACT)


def test_lora_refuses_a_token_whose_two_embeddings_are_one():
    model = seg_model(seg_processor())
    model.vlm.lm_head.weight = model.get_input_embeddings().weight
    with pytest.raises(ValueError, match="tie_word_embeddings: false"):
        add_lora(model, lora_arguments("span_projector"))


def test_another_span_source_than_the_checkpoints_is_refused(trained):
    model, _ = load_checkpoint(trained)
    with pytest.raises(ValueError, match="the processor seg_token None of id None"):
        check_span_source(model.config, tiny_processor())
