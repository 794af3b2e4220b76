"""Make conversations that ask for one thing at a time: a class, a part of an object, or a referring expression.

    part example with labels as phrases ──> "Outline the sky, please." "Outlined: the <p>sky</p>." ...

Each mask of the example is asked for once, in random order, at most TURNS per conversation. The wording of an answer
follows from its question. A thing that the image does not show gets an answer without a tag.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace

from plum_partonomy.questions.conversations import conversation, fill_template, turn
from plum_partonomy.questions.spans import tag_phrases
from plum_partonomy.records import TWO_STEP_TYPES, GroundedConversation, PartExample, PartMask, Question, escape_tags
from plum_partonomy.seeding import seeded_generator

TURNS = 3

# question, answer, and answer if the image does not show it; {thing} is "the sky", {tagged} "the <p>sky</p>"
PHRASINGS = (
    ("Show me {thing}.", "Here you see {tagged}.", "I have looked, but nothing here fits that."),
    ("Can you find {thing}?", "Yes, I found {tagged}.", "No, I cannot find it here."),
    ("Please mark {thing} in the picture.", "Marked: {tagged}.", "There is nothing to mark."),
    ("Which pixels belong to {thing}?", "The highlighted ones belong to {tagged}.", "None of them."),
    ("Point out {thing} for me.", "{Tagged}, as you asked.", "I am afraid I see nothing of the kind."),
    ("Outline {thing}, please.", "Outlined: {tagged}.", "The picture shows no such thing."),
    ("I am looking for {thing}. Can you help?", "Look here: {tagged}.", "It is not in this picture."),
    ("Would you highlight {thing}?", "Of course, {tagged}.", "I would, but it is not there."),
    ("Where do you see {thing}?", "I see {tagged} right here.", "Nowhere."),
    ("In this picture, where is {thing} to be found?", "{Tagged} can be found here.", "It cannot be found here."),
    ("I would like a mask of {thing}.", "This mask covers {tagged}.", "That mask would be empty."),
    ("Locate {thing}.", "{Tagged}.", "Not visible."),
)


def ask_for_each(
    example: PartExample, *, article: str = "", absent: Collection[str] = (), seed: int
) -> Iterator[GroundedConversation]:
    """Yield conversations about all masks of the example, named by their labels with the article.

    Labels may repeat. The result depends only on (seed, source, image_id) and the set of labels.

    Args:
        absent: Names that the image does not show.
    """
    rng = seeded_generator(seed, "grounding", example.source, example.image_id)
    shown = sorted(example.masks, key=lambda mask: (mask.label, mask.rle["counts"]))
    things = [*((mask.label, mask) for mask in shown), *((name, None) for name in sorted(absent))]
    order = rng.permutation(len(things)).tolist()
    for start in range(0, len(order), TURNS):
        messages, masks = [], []
        for position in order[start : start + TURNS]:
            name, mask = things[position]
            words = {"thing": article + escape_tags(name), "tagged": f"{article}<p>{escape_tags(name)}</p>"}
            question, answer, absence = PHRASINGS[rng.integers(len(PHRASINGS))]
            messages += turn(fill_template(question, **words), fill_template(answer if mask else absence, **words))
            masks += [mask] if mask else []
        yield conversation(example, f"{example.image_id}-{start // TURNS}", messages, masks)


def ask_for_parts(example: PartExample, *, seed: int) -> Iterator[GroundedConversation]:
    """Yield conversations about the parts of an object under either of two names: "wing of the bird", "bird wing"."""
    rng = seeded_generator(seed, "names", example.source, example.image_id)
    masks = []
    for mask in sorted(example.masks, key=lambda mask: mask.label):
        names = f"{mask.label} of the {example.image_label}", f"{example.image_label} {mask.label}"
        masks.append(PartMask(names[rng.integers(2)], mask.rle))
    yield from ask_for_each(replace(example, masks=masks), article="the ", seed=seed)


def answer_question(question: Question) -> GroundedConversation:
    """Return the benchmark question with its correct answer, parts tagged. A two-step question has two turns."""
    parts = question.choice_parts[question.correct]
    answer = tag_phrases(question.choices[question.correct], parts)
    messages = turn(escape_tags(question.question), answer)
    if question.question_type in TWO_STEP_TYPES:
        object_answer = escape_tags(question.object_choices[question.object_correct])
        about_object = turn(escape_tags(question.object_question), object_answer)
        first_object = question.question_type == "whole_to_part"
        messages = about_object + messages if first_object else messages + about_object
    by_label = {mask.label: mask for mask in question.masks}
    return conversation(question, question.id, messages, [by_label[part] for part in parts])
