"""Make training conversations about part examples, in varied wording.

A conversation has up to six question-and-answer turns about one image, in random order: which parts are visible, which
of them another object shares, which it lacks, which one other object shares and a second one lacks, what the object
is, and where one part is or whether it is visible (some of these answers have no tags). Together with asking for the
object before or after its parts, these are all ten question types of the benchmark. About half of the turns use the
official wording, the rest the phrasings below, so that a span tagger cannot rely on one template. The wording of an
answer follows from its question (the n-th answer belongs to the n-th question), so the only unknown is in the image.

In the templates {part} and the lists contain the span tags. A tag encloses the part name without its article.
"""

from dataclasses import dataclass, field
from functools import cache

import numpy as np

from plum_partonomy.questions.maker import filter_parts, possible_partners
from plum_partonomy.questions.part_statistics import PartGraph
from plum_partonomy.questions.spans import join_parts
from plum_partonomy.questions.wording import (
    OBJECT_QUESTION,
    inflect_engine,
    object_answer,
    official_answer,
    official_question,
    with_article,
)
from plum_partonomy.records import UNNAMED_OBJECT, GroundedConversation, PartExample, PartMask, Question, escape_tags
from plum_partonomy.seeding import seeded_generator

OFFICIAL_SHARE = 0.5

# Fields: name ("object" or the label), partner ("a bus"), contrast ("a van"), parts ("x, y, and z"), a_parts ("an x
# and a y"), the_parts ("the x and the y"); a capital first letter of a field capitalises the text put there.
QUESTIONS = {
    "identification": (
        "Which parts can you see on the {name}?",
        "What parts of the {name} are visible here?",
        "List the visible parts of the {name}.",
        "Name every part of the {name} that can be seen.",
        "Look at the {name}. Which parts does it have?",
        "Tell me the parts of this {name}.",
        "Can you point out the parts of the {name}?",
        "Describe the {name} by its parts.",
        "Which parts make up the {name} in the picture?",
    ),
    "positive": (
        "Which visible parts does the {name} share with {partner}?",
        "What parts of the {name} would {partner} have too?",
        "Compare the {name} with {partner}: which visible parts do both have?",
        "Which visible parts of the {name} could belong to {partner} as well?",
        "Name the visible parts that the {name} and {partner} have in common.",
        "{Partner} and this {name}: which visible parts are common to both?",
        "List what you see on the {name} that {partner} also has.",
        "Think of {partner}. Which of its parts can you see on the {name}?",
    ),
    "negative": (
        "Which visible parts of the {name} would {partner} lack?",
        "What does the {name} have that {partner} does not?",
        "Compare the {name} with {partner}: which visible parts has only the {name}?",
        "Which parts here set the {name} apart from {partner}?",
        "Name the visible parts of the {name} that {partner} never has.",
        "{Partner} would miss some parts of this {name}. Which ones do you see?",
        "List what you see on the {name} that is not part of {partner}.",
        "Think of {partner}. Which parts of the {name} does it not have?",
    ),
    "difference": (
        "Which visible parts does the {name} share with {partner} but not with {contrast}?",
        "What does the {name} have that {partner} has too, and {contrast} does not?",
        "Compare the {name} with {partner} and {contrast}: which visible parts has the last one not?",
        "Which visible parts of the {name} could belong to {partner}, but not to {contrast}?",
        "Name the visible parts that the {name} has in common with {partner} and that {contrast} lacks.",
        "{Partner} and this {name} against {contrast}: which visible parts do only the first two have?",
        "List what you see on the {name} that {partner} also has and {contrast} never has.",
        "Think of {partner} and {contrast}. Which parts of the {name} does only the first one have?",
    ),
    "location": (
        "Where is the {plain}?",
        "Point to the {plain}.",
        "Show me the {plain}.",
        "Can you find the {plain}?",
        "Mark the {plain} of the {name}.",
        "Please highlight the {plain}.",
        "Which region shows the {plain}?",
        "Locate the {plain} in the picture.",
    ),
    "presence": (
        "Does it have {a_plain}?",
        "Does the {name} have {a_plain}?",
        "Can you see {a_plain}?",
        "Do you see {a_plain} on the {name}?",
        "Has this {name} got {a_plain}?",
        "Could you spot {a_plain} here?",
        "Would you say the {name} has {a_plain}?",
        "Check the {name} for {a_plain}, please.",
    ),
    "object": (
        "What is the object in the image?",
        "What is this?",
        "Name the object.",
        "Which kind of object is shown?",
        "What does the picture show?",
        "Identify the object, please.",
        "What would you call this object?",
        "Which object is this?",
    ),
    "instances": (
        "Which {plural} can you see?",
        "Show me the {plural}.",
        "Point out each {plain}.",
        "List the {plural} one by one.",
        "Mark every {plain} of the {name}.",
        "Where are the {plural}?",
        "Go through the {plural} of the {name}.",
        "Find all {plural} in the picture.",
    ),
}
ANSWERS = {
    "identification": (
        "I can see {a_parts}.",
        "{A_parts} can be seen.",
        "The {name} shows {a_parts}.",
        "{parts}.",
        "It has {a_parts}.",
        "Visible on the {name}: {parts}.",
        "I can make out {the_parts}.",
        "{The_parts} can be made out on the {name}.",
        "{parts}: that is all I can see.",
    ),
    "positive": (
        "It shares {the_parts} with {partner}.",
        "Both have {a_parts}.",
        "{A_parts} would suit {partner} too.",
        "In common: {parts}.",
        "{Partner} has {a_parts} as well.",
        "{parts}.",
        "Like {partner}, the {name} has {a_parts}.",
        "{The_parts} can be found on both.",
    ),
    "negative": (
        "{Partner} would lack {the_parts}.",
        "Only the {name} has {a_parts}.",
        "{A_parts} would be missing on {partner}.",
        "Not on {partner}: {parts}.",
        "{parts}.",
        "Unlike {partner}, the {name} has {a_parts}.",
        "It has {a_parts}, which {partner} does not.",
        "{The_parts} set it apart from {partner}.",
    ),
    "difference": (
        "Unlike {contrast}, {partner} has {the_parts} as well.",
        "{A_parts}: {partner} has that too, {contrast} does not.",
        "{Contrast} has no {parts}.",
        "{A_parts} would suit {partner}, but not {contrast}.",
        "In common with {partner} and not with {contrast}: {parts}.",
        "{parts}.",
        "Like {partner} and unlike {contrast}, the {name} has {a_parts}.",
        "Only {partner} has {the_parts} too.",
    ),
    "location": (
        "The {part} {is} over here.",
        "Here {is} the {part}.",
        "This marks the {part}.",
        "The {part} {is} highlighted.",
        "I found the {part}.",
        "Sure, the {part}.",
        "{part}.",
        "You can see the {part} here.",
    ),
    "presence": (
        "Yes, its {part} {is} visible.",
        "Yes, I see {a_part}.",
        "Yes, the {part} {is} here.",
        "Yes, it has {a_part}.",
        "It does: {part}.",
        "Yes: the {part}.",
        "Indeed, {a_part} can be seen.",
        "Yes, you can see the {part}.",
    ),
    "absence": (
        "No, I see no {plain}.",
        "No, it has no {plain}.",
        "No.",
        "No {plain} can be seen.",
        "No, the {plain} {is} missing.",
        "No, the {name} has no {plain}.",
        "No {plain} in sight.",
        "It does not.",
    ),
    "object": (
        "It is {a_label}.",
        "This is {a_label}.",
        "{A_label}.",
        "The picture shows {a_label}.",
        "I would call it {a_label}.",
        "That is {a_label}.",
        "The object is {a_label}.",
        "You are looking at {a_label}.",
    ),
    "instances": (
        "I can see {counted}.",
        "{Counted} can be seen.",
        "There is {counted}.",
        "The {name} has {counted}.",
        "Here is {counted}.",
        "It shows {counted}.",
        "I found {counted}.",
        "In the picture: {counted}.",
    ),
}


@dataclass
class _Turn:
    """A question, its answer with span tags, and the labels of the tags in order."""

    question: str
    answer: str
    labels: list[str] = field(default_factory=list)


def converse(example: PartExample, *, part_graph: PartGraph, seed: int) -> GroundedConversation:
    """Return a conversation of two to six turns about the example, with a tag on each phrase that names a visible
    part.

    Comparisons without a matching object are skipped, and an object without a name is not asked for. Parts are listed
    alphabetically. The result depends only on (seed, image_id).
    """
    rng = seeded_generator(seed, "conversation", example.image_id)
    kinds = ("identification", "positive", "negative", "difference")
    turns = [_benchmark_turn(kind, example, part_graph=part_graph, rng=rng) for kind in kinds]
    turns.append(_object_turn(example, rng=rng) if example.image_label != UNNAMED_OBJECT else None)
    turns.append(_part_turn(example, part_graph=part_graph, rng=rng))
    asked = [turn for turn in turns if turn is not None]
    shuffled = [asked[position] for position in rng.permutation(len(asked))]
    return _conversation(example, shuffled, {mask.label: [mask] for mask in example.masks})


def converse_about_instances(example: PartExample, *, seed: int) -> GroundedConversation:
    """Return a conversation with one turn per part that occurs several times; its instances share a name, in random
    order.

    `example` has one mask per instance, with repeated labels.
    """
    rng = seeded_generator(seed, "conversation", example.image_id)
    masks: dict[str, list[PartMask]] = {}
    for position in rng.permutation(len(example.masks)):
        mask = example.masks[position]
        masks.setdefault(mask.label, []).append(mask)
    repeated = sorted(label for label in masks if len(masks[label]) > 1)
    turns = [_instance_turn(example, part, len(masks[part]), rng) for part in rng.permutation(repeated).tolist()]
    return _conversation(example, turns, masks)


def turn(question: str, answer: str) -> list[dict[str, str]]:
    """Return the messages of the user and the assistant."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def conversation(
    about: PartExample | Question, id: str, messages: list[dict[str, str]], masks: list[PartMask] | None
) -> GroundedConversation:
    """Return a conversation about the image of a record. Raises DataError if the messages do not match the masks."""
    made = GroundedConversation(
        id=id,
        image=about.image,
        image_id=about.image_id,
        image_label=about.image_label,
        messages=messages,
        masks=masks,
        source=about.source,
        licence=about.licence,
    )
    made.validate(where=f"conversation {id}")
    return made


def _conversation(example: PartExample, turns: list[_Turn], masks: dict[str, list[PartMask]]) -> GroundedConversation:
    """Join the turns; the n-th tag of a label within a turn takes the n-th mask of that label."""
    messages, grounding = [], []
    for asked in turns:
        messages += turn(asked.question, asked.answer)
        grounding += [
            masks[label][asked.labels[:position].count(label)] for position, label in enumerate(asked.labels)
        ]
    return conversation(example, f"{example.image_id}-conversation", messages, grounding)


def _benchmark_turn(
    kind: str, example: PartExample, *, part_graph: PartGraph, rng: np.random.Generator
) -> _Turn | None:
    """Return a turn about the parts, with or without the object's label; None without objects to compare with."""
    label = example.image_label
    visible = sorted(mask.label for mask in example.masks)
    question_type = str(rng.choice([kind, f"{kind}_with_label"]))
    named = {name: parts for name, parts in part_graph.items() if name != UNNAMED_OBJECT}
    found = _draw_compared(kind, label=label, visible=visible, part_graph=named, rng=rng)
    if found is None:
        return None
    compared, parts = found
    name = "object" if kind == question_type else escape_tags(label)
    if rng.random() < OFFICIAL_SHARE:
        words = {"image_label": name, **{role: other and escape_tags(other) for role, other in compared.items()}}
        question = official_question(question_type, **words)
        answer = official_answer(question_type, join_parts([_tagged(part) for part in parts]), **words)
    else:
        others = {role: other and with_article(escape_tags(other)) for role, other in compared.items()}
        words = {"name": name, **others}
        style = _pick_style(kind, rng)
        question = fill_template(QUESTIONS[kind][style], **words)
        answer = fill_template(
            ANSWERS[kind][style],
            **words,
            parts=join_parts([_tagged(part) for part in parts]),
            a_parts=_join_naturally([_after_article(part) for part in parts]),
            the_parts=_join_naturally([f"the {_tagged(part)}" for part in parts]),
        )
    return _Turn(question, answer, parts)


def _draw_compared(
    kind: str, *, label: str, visible: list[str], part_graph: PartGraph, rng: np.random.Generator
) -> tuple[dict[str, str | None], list[str]] | None:
    """Return partner and contrast of a turn (None if the turn has none) and the visible parts that answer it."""
    if kind != "difference":
        partners = possible_partners(kind, label=label, visible=visible, part_graph=part_graph)
        if not partners:
            return None
        partner = partners[rng.integers(len(partners))]
        parts = filter_parts(kind, visible, partner=partner, part_graph=part_graph)
        return {"partner": partner, "contrast": None}, parts
    partners = possible_partners("positive", label=label, visible=visible, part_graph=part_graph)
    for position in rng.permutation(len(partners)):
        shared = set(visible).intersection(part_graph[partners[position]])
        contrasts = [name for name in sorted(part_graph) if not shared.issubset(part_graph[name])]
        if contrasts:
            contrast = contrasts[rng.integers(len(contrasts))]
            parts = sorted(shared.difference(part_graph[contrast]))
            return {"partner": partners[position], "contrast": contrast}, parts
    return None


def _object_turn(example: PartExample, *, rng: np.random.Generator) -> _Turn:
    """Return a turn that asks for the object, half of the time in the benchmark's words."""
    label = escape_tags(example.image_label)
    if rng.random() < OFFICIAL_SHARE:
        return _Turn(OBJECT_QUESTION, object_answer(label))
    style = _pick_style("object", rng)
    answer = fill_template(ANSWERS["object"][style], a_label=with_article(label))
    return _Turn(fill_template(QUESTIONS["object"][style]), answer)


def _part_turn(example: PartExample, *, part_graph: PartGraph, rng: np.random.Generator) -> _Turn:
    """Return a turn that asks where a part is, or whether it is visible."""
    label = escape_tags(example.image_label)
    kind = str(rng.choice(["location", "presence"]))
    style = _pick_style(kind, rng)
    visible = sorted(mask.label for mask in example.masks)
    missing = sorted(set(part_graph[example.image_label]) - set(visible))
    present = kind == "location" or not missing or rng.random() < 0.5
    part = str(rng.choice(visible if present else missing))
    plain = escape_tags(part)
    words = {
        "name": str(rng.choice(["object", label])),
        "plain": plain,
        "a_plain": plain if _is_plural(plain) else with_article(plain),
        "is": "are" if _is_plural(plain) else "is",
    }
    question = fill_template(QUESTIONS[kind][style], **words)
    if not present:
        return _Turn(question, fill_template(ANSWERS["absence"][style], **words))
    words |= {"part": _tagged(part), "a_part": _after_article(part)}
    return _Turn(question, fill_template(ANSWERS[kind][style], **words), [part])


def _instance_turn(example: PartExample, part: str, count: int, rng: np.random.Generator) -> _Turn:
    plain = escape_tags(part)
    openings = [with_article(plain).split(" ", 1)[0], "another", *[f"a {_ordinal(n)}" for n in range(3, count + 1)]]
    words = {
        "name": str(rng.choice(["object", escape_tags(example.image_label)])),
        "plain": plain,
        "plural": inflect_engine().plural_noun(plain),
        "counted": _join_naturally([f"{opening} {_tagged(part)}" for opening in openings[:count]]),
    }
    style = _pick_style("instances", rng)
    question = fill_template(QUESTIONS["instances"][style], **words)
    return _Turn(question, fill_template(ANSWERS["instances"][style], **words), [part] * count)


def _pick_style(kind: str, rng: np.random.Generator) -> int:
    return int(rng.integers(len(QUESTIONS[kind])))


def fill_template(template: str, **words: str | None) -> str:
    """Return the template with its fields filled in; a capitalised field name capitalises the text."""
    capitalised = {key.capitalize(): value[:1].upper() + value[1:] for key, value in words.items() if value}
    return template.format(**words, **capitalised)


def _tagged(part: str) -> str:
    return f"<p>{escape_tags(part)}</p>"


def _after_article(part: str) -> str:
    if _is_plural(part):
        return _tagged(part)
    return f"{with_article(part).split(' ', 1)[0]} {_tagged(part)}"


def _join_naturally(phrases: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))


@cache
def _is_plural(phrase: str) -> bool:
    return bool(inflect_engine().singular_noun(phrase.rsplit(" ", 1)[-1]))


@cache
def _ordinal(number: int) -> str:
    engine = inflect_engine()
    return engine.number_to_words(engine.ordinal(number))
