from collections import Counter

import numpy as np

from plum_partonomy.drawn.miniature import draw_example, part_graph, presence
from plum_partonomy.masks import encode
from plum_partonomy.questions.grounding import PHRASINGS, TURNS, answer_question, ask_for_each, ask_for_parts
from plum_partonomy.questions.maker import make_questions
from plum_partonomy.records import PartExample, PartMask, Question, tagged_phrases


def square(size: int) -> dict:
    mask = np.zeros((8, 8), dtype=bool)
    mask[:size, :size] = True
    return encode(mask)


def scene(*names: str) -> PartExample:
    masks = [PartMask(name, square(size)) for size, name in enumerate(names, start=1)]
    return PartExample(None, "image 1", "", masks, "scenes", "none")


def phrases(conversation) -> list[str]:
    return [phrase for message in conversation.messages for phrase in tagged_phrases(message["content"])]


def test_everything_is_asked_for_once_a_few_times_in_a_conversation_and_tagged_with_its_own_mask():
    names = ["sky", "tree", "road", "car", "stairs", "water", "grass"]
    example = scene(*names)
    made = list(ask_for_each(example, article="the ", seed=0))
    assert [len(conversation.messages) // 2 for conversation in made] == [TURNS, TURNS, 1]
    assert len({conversation.id for conversation in made}) == 3
    assert sorted(phrase for conversation in made for phrase in phrases(conversation)) == sorted(names)
    by_label = {mask.label: mask.rle for mask in example.masks}
    for conversation in made:
        assert [mask.label for mask in conversation.masks] == phrases(conversation)
        assert all(mask.rle == by_label[mask.label] for mask in conversation.masks)


def test_the_order_of_masks_and_names_changes_nothing_but_the_seed_does():
    example = scene("left man", "man", "left man")
    example.masks.append(PartMask("left man", square(5)))
    made = list(ask_for_each(example, absent=["dog", "cat"], seed=0))
    example.masks.reverse()
    assert list(ask_for_each(example, absent=["cat", "dog"], seed=0)) == made
    assert list(ask_for_each(example, absent=["cat", "dog"], seed=1)) != made


def test_what_is_not_shown_is_answered_without_a_tag():
    (conversation,) = ask_for_each(scene(), absent=["two dogs"], seed=3)
    question, answer = (message["content"] for message in conversation.messages)
    assert "two dogs" in question
    assert answer in {absence for _, _, absence in PHRASINGS}
    assert conversation.masks == []


def test_every_phrasing_is_used_and_asks_for_the_thing_itself():
    asked = Counter()
    for seed in range(200):
        (conversation,) = ask_for_each(scene("<p>odd</p>"), article="the ", seed=seed)
        asked[conversation.messages[0]["content"]] += 1
        assert phrases(conversation) == ["<p>odd</p>"]
    assert len(asked) == len(PHRASINGS)
    assert all(r"the \<p>odd\</p>" in question for question in asked)


def test_parts_are_called_by_either_of_two_names():
    example = PartExample(None, "image 1", "bird", [PartMask("wing", square(2))], "parts", "none")
    named = Counter(
        phrases(conversation)[0] for seed in range(50) for conversation in ask_for_parts(example, seed=seed)
    )
    assert set(named) == {"wing of the bird", "bird wing"}
    assert min(named.values()) > 10


def test_questions_of_the_benchmark_are_answered_with_the_correct_choice_and_its_masks():
    example = draw_example("train", 3)
    graphs = {"part_graph": part_graph(), "instance_graph": {}, "presence": presence()}
    questions = make_questions(example, **graphs, seed=0)
    assert len(questions) == 10
    for question in questions:
        conversation = answer_question(question)
        assert conversation.id == question.id
        assert phrases(conversation) == question.choice_parts[question.correct]
        asked = [message["content"] for message in conversation.messages]
        place = asked.index(question.question)
        assert asked[place + 1].replace("<p>", "").replace("</p>", "") == question.choices[question.correct]


def test_a_question_of_two_steps_asks_for_the_object_first_or_last():
    about_object = {
        "object_question": "What is the object in the image?",
        "object_choices": ["It is a bus.", "It is a car."],
        "object_classes": ["bus", "car"],
        "object_correct": 1,
    }
    for question_type, object_turn in (("whole_to_part", 0), ("part_to_whole", 1)):
        question = Question(
            id="1",
            image=None,
            image_id="1",
            image_label="car",
            question_type=question_type,
            question="Which parts?",
            choices=["It has a door, and wheel.", "It has a door."],
            correct=0,
            choice_parts=[["door", "wheel"], ["door"]],
            masks=[PartMask("wheel", square(1)), PartMask("door", square(2))],
            **about_object,
        )
        conversation = answer_question(question)
        contents = [message["content"] for message in conversation.messages]
        assert contents[2 * object_turn :][:2] == ["What is the object in the image?", "It is a car."]
        assert [mask.label for mask in conversation.masks] == ["door", "wheel"]
