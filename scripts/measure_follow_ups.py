"""
Compare the answers to questions asked first with those to the same questions asked second, after another one.

    python scripts/measure_follow_ups.py --model checkpoints/plum-tiny --name mini_questions

"Second" means after another question about the same image and its correct answer. Prints precision and recall of the
parts of the generated answers, and the share of answers with exactly the correct parts.
"""

import argparse
from collections.abc import Sequence

import torch
from tqdm import tqdm

from plum_partonomy.inference.one_image import load_model
from plum_partonomy.inference.predictor import ask
from plum_partonomy.records import Question, as_chat, escape_tags
from plum_partonomy.scoring.benchmark import load_image, load_questions
from plum_partonomy.scoring.metrics import part_counts, true_parts

BATCH_SIZE = 16
MAX_NEW_TOKENS = 96


def pair_questions(questions: Sequence[Question]) -> list[tuple[Question, Question]]:
    """Return each question with the one before it about the same image, cyclically; single questions are skipped."""
    of_image: dict[str, list[Question]] = {}
    for question in questions:
        of_image.setdefault(question.image_id, []).append(question)
    return [
        (group[i - 1], question) for group in of_image.values() if len(group) > 1 for i, question in enumerate(group)
    ]


def converse(before: Question | None, question: Question) -> list[dict[str, str]]:
    """Return the question, after another one and its correct answer if there is one."""
    if before is None:
        return ask(question)
    answer = {"role": "assistant", "content": escape_tags(before.choices[before.correct])}
    return [*ask(before), answer, *ask(question)]


@torch.no_grad()
def measure(plum, rows, pairs: Sequence[tuple[Question, Question]], row_of: dict[str, int], *, second: bool) -> dict:
    """Return precision and recall of parts, pooled over the questions, and the share of exactly correct sets."""
    hits = predicted = true = exact = 0
    for start in tqdm(range(0, len(pairs), BATCH_SIZE), desc="second" if second else "first", unit="batch"):
        batch = pairs[start : start + BATCH_SIZE]
        chats = [
            as_chat(
                converse(before if second else None, question),
                load_image(rows, row_of[question.id], question),
            )
            for before, question in batch
        ]
        inputs = plum.processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, padding_side="left"
        )
        outputs = plum.model.segment(**inputs.to(plum.model.device), max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers = plum.processor.post_process_segmentation(outputs)
        for answer, (_, question) in zip(answers, batch, strict=True):
            counts = part_counts([span.text for span in answer.spans], true_parts(question))
            hits, predicted, true = hits + counts.hits, predicted + counts.predicted, true + counts.true
            exact += counts.hits == counts.predicted == counts.true
    return {"precision": hits / max(predicted, 1), "recall": hits / max(true, 1), "exact": exact / len(pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a checkpoint, or its name on the Hub")
    parser.add_argument("--dataset", default="partonomy")
    parser.add_argument("--name", default="mini_questions", help="its configuration, with questions")
    parser.add_argument("--split", default="test")
    parser.add_argument("--data_dir", help="folder of your files, if --name needs one")
    arguments = parser.parse_args()
    options = {} if arguments.data_dir is None else {"data_dir": arguments.data_dir}
    rows, questions = load_questions(arguments.dataset, name=arguments.name, split=arguments.split, **options)
    row_of = {question.id: row for row, question in enumerate(questions)}
    pairs = pair_questions(questions)
    _, plum = load_model(arguments.model)
    results = {place: measure(plum, rows, pairs, row_of, second=place == "second") for place in ("first", "second")}
    print(f"{len(pairs)} questions\n| asked | precision | recall | exactly correct |\n|---|---:|---:|---:|")
    for place, figures in results.items():
        print(f"| {place} | " + " | ".join(f"{value:.3f}" for value in figures.values()) + " |")


if __name__ == "__main__":
    main()
