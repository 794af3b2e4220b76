"""
Evaluation of plum-tiny on benchmark questions as in evaluate_plum.py, against one question and one choice at a time,
each with its image, and masks span by span.

    python perf/evaluation.py
"""

from itertools import chain

import torch
from choices import segment_span_by_span
from measure import compare
from plum_tiny import build_plum_tiny

from modules_plum import keep_last_answer
from plum_partonomy.inference.predictor import Predictor, ask, choose, write_choice
from plum_partonomy.masks import decode
from plum_partonomy.records import as_chat
from plum_partonomy.scoring.benchmark import Asked, load_image, load_questions, make_batches, pick_wrong_images

QUESTIONS, BATCH, NEW_TOKENS = 16, 16, 24


class OneByOne:
    """Computes each choice and each span in a separate pass over image and words."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor

    def predict(self, question, image) -> tuple[torch.Tensor, str, list[torch.Tensor]]:
        """Return the scores of the choices, the generated answer, and the masks of the correct one."""
        scores = [self.score(as_chat(messages, image)) for messages in choose(question, tagged=False)]
        tagged = write_choice(question, question.correct, tagged=True)
        chat = as_chat([*ask(question), {"role": "assistant", "content": tagged}], image)
        batch = self.encode(chat)
        given = self.segment(batch, batch["spans"])
        prompt = self.encode(as_chat(ask(question), image), add_generation_prompt=True)
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        written = self.model.segment(**prompt, **options)
        (answer,) = self.processor.post_process_segmentation(written)
        return torch.tensor(scores), answer.text, given

    def encode(self, chat, **options) -> dict:
        return dict(self.processor.apply_chat_template([chat], tokenize=True, return_dict=True, **options))

    def score(self, chat) -> float:
        batch = self.encode(chat)
        labels = keep_last_answer(batch["labels"])
        logits = self.model(**batch | {"labels": None, "spans": None}).logits
        return float(torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]))

    def segment(self, batch, spans) -> list[torch.Tensor]:
        outputs = self.model(**batch | {"labels": None, "spans": None})
        embeddings = self.model.get_image_embeddings(batch["sam_pixel_values"])
        masks = segment_span_by_span(self.model, outputs.last_hidden_state[0], spans, embeddings)
        if not masks:
            return []
        sizes = [batch[name].tolist() for name in ("original_sizes", "reshaped_input_sizes")]
        upscaled = self.processor.sam_image_processor.post_process_masks([torch.stack(masks)[:, None]], *sizes)[0]
        return list(upscaled[:, 0])


@torch.no_grad()
def main() -> list[dict]:
    model, processor = build_plum_tiny()
    rows, questions = load_questions("partonomy", name="mini_questions", split="test", limit=QUESTIONS)
    images = {question.image_id: load_image(rows, i, question) for i, question in enumerate(questions)}
    wrong = pick_wrong_images(questions)
    shown = [(each, each.image_id) for each in questions] + [(each, wrong[each.image_id]) for each in questions]
    asked = [Asked(question, images[image_id], image_id) for question, image_id in shown]
    groups = make_batches(questions, BATCH)
    batches = [batch + [index + len(questions) for index in batch] for batch in chain.from_iterable(groups)]

    def one_by_one(count):
        one = OneByOne(model, processor)
        return [one.predict(each.question, each.image) for each in asked[:count]]

    def together():
        predictor = Predictor(
            model,
            processor,
            max_new_tokens=NEW_TOKENS,
            choice_reduction="answer_mean",
            mask_source="gt_answer",
        )
        predictions = {}
        for batch in batches:
            found = predictor.predict([asked[i] for i in batch])
            predictions |= dict(zip(batch, found, strict=True))
        return [
            (
                torch.tensor(predictions[i].choice_scores),
                predictions[i].generated_text,
                [torch.from_numpy(decode(span.rle)) for span in predictions[i].given_spans],
            )
            for i in range(len(asked))
        ]

    return compare(
        "evaluation of mini_questions with plum-tiny, and its wrong-image control",
        old=lambda: one_by_one(len(asked)),
        new=together,
        old_part=lambda: one_by_one(1),
        target=3.0,
        rounds=1,
        questions=QUESTIONS,
        images=len(images),
        batch=BATCH,
        new_tokens=NEW_TOKENS,
    )


if __name__ == "__main__":
    main()
