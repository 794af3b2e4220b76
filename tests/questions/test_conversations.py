import re
from collections import Counter

import numpy as np
import pytest

from plum_partonomy.drawn import miniature
from plum_partonomy.masks import encode
from plum_partonomy.questions.conversations import ANSWERS, QUESTIONS, converse, converse_about_instances
from plum_partonomy.records import PartExample, PartMask, tagged_phrases

GRAPH = miniature.part_graph()


@pytest.fixture(scope="module")
def examples():
    return [miniature.draw_example("train", index) for index in range(240)]


@pytest.fixture(scope="module")
def conversations(examples):
    return [converse(example, part_graph=GRAPH, seed=0) for example in examples]


def answers(conversation) -> list[str]:
    return [message["content"] for message in conversation.messages if message["role"] == "assistant"]


def test_every_tagged_phrase_is_grounded_by_the_mask_of_that_part(examples, conversations):
    for example, conversation in zip(examples, conversations, strict=True):
        by_label = {mask.label: mask.rle for mask in example.masks}
        phrases = [phrase for answer in answers(conversation) for phrase in tagged_phrases(answer)]
        assert phrases == [mask.label for mask in conversation.masks]
        assert all(mask.rle == by_label[mask.label] for mask in conversation.masks)


def test_parts_are_listed_alphabetically_and_once_per_answer(conversations):
    for conversation in conversations:
        for answer in answers(conversation):
            phrases = tagged_phrases(answer)
            assert phrases == sorted(set(phrases))


def test_there_are_six_turns_unless_no_other_object_can_be_compared(conversations):
    turns = Counter(len(conversation.messages) // 2 for conversation in conversations)
    assert set(turns) <= {3, 4, 5, 6}
    assert turns[6] > 0.9 * len(conversations)


def test_parts_that_one_object_shares_and_another_lacks_are_those_of_the_graph(examples, conversations):
    asked = 0
    pattern = r"in common with an? ([a-z ]+) but not with an? ([a-z ]+)\?$"
    for example, conversation in zip(examples, conversations, strict=True):
        visible = {mask.label for mask in example.masks}
        for question, answer in zip(conversation.messages[::2], conversation.messages[1::2], strict=True):
            if found := re.search(pattern, question["content"]):
                partner, contrast = found.groups()
                wanted = sorted(visible & set(GRAPH[partner]) - set(GRAPH[contrast]))
                assert tagged_phrases(answer["content"]) == wanted != []
                asked += 1
    assert asked > 0.3 * len(conversations)


def test_no_template_dominates_and_answers_begin_and_end_with_parts_or_ground_nothing(conversations):
    texts = [answer for conversation in conversations for answer in answers(conversation)]
    official = [text for text in texts if "in the image has the following visible parts" in text]
    assert 0.2 < len(official) / len(texts) < 0.5
    assert sum(text.startswith("<p>") for text in texts) >= 10
    assert sum(re.search(r"</p>\.$", text) is not None for text in texts) >= 10
    assert sum("<p>" not in text for text in texts) >= 30


def test_one_turn_names_every_visible_part_and_its_place_varies(examples, conversations):
    places = Counter()
    for example, conversation in zip(examples, conversations, strict=True):
        visible = sorted(mask.label for mask in example.masks)
        places[[tagged_phrases(answer) for answer in answers(conversation)].index(visible)] += 1
    assert set(places) == {0, 1, 2, 3, 4, 5}


def test_each_kind_has_at_least_eight_phrasings():
    assert all(len(set(phrasings)) >= 8 for table in (QUESTIONS, ANSWERS) for phrasings in table.values())


def test_a_denied_part_is_one_the_object_could_have_and_does_not_show(examples, conversations):
    denied = 0
    for example, conversation in zip(examples, conversations, strict=True):
        visible = {mask.label for mask in example.masks}
        for answer in answers(conversation):
            found = re.match(r"No, I see no (.+)\.$", answer)
            if found:
                assert found.group(1) in set(GRAPH[example.image_label]) - visible
                denied += 1
    assert denied


def test_conversations_do_not_depend_on_what_was_made_before(examples, conversations):
    assert converse(examples[100], part_graph=GRAPH, seed=0) == conversations[100]
    assert converse(examples[100], part_graph=GRAPH, seed=1) != conversations[100]


def test_articles_are_outside_the_tag_and_right():
    rle = encode(np.eye(4, dtype=bool))
    example = PartExample(None, "", "outfit", [PartMask(part, rle) for part in ("engine", "shoes")], "", "")
    graph = {"outfit": ["engine", "shoes"]}
    texts = set()
    for seed in range(200):
        texts.update(answers(converse(example, part_graph=graph, seed=seed)))
    assert "I can see an <p>engine</p> and <p>shoes</p>." in texts
    assert "The <p>shoes</p> are over here." in texts
    assert not any("a <p>engine" in text or "a <p>shoes" in text for text in texts)


def test_a_literal_tag_in_a_label_is_escaped():
    rle = encode(np.eye(4, dtype=bool))
    example = PartExample(None, "", "<p>odd", [PartMask("</p>wing", rle)], "", "")
    for seed in range(20):
        conversation = converse(example, part_graph={"<p>odd": ["</p>wing"]}, seed=seed)
        assert all(tagged_phrases(text) in ([], ["</p>wing"]) for text in answers(conversation))


def test_instances_are_named_alike_in_random_order_and_each_by_its_own_mask():
    orders = Counter()
    for index in range(48):
        example = miniature.draw_instances_example("train", index)
        conversation = converse_about_instances(example, seed=0)
        repeated = Counter(mask.label for mask in example.masks)
        assert Counter(mask.label for mask in conversation.masks) == {
            label: count for label, count in repeated.items() if count > 1
        }
        assert len({mask.rle["counts"] for mask in conversation.masks}) == len(conversation.masks)
        for answer in answers(conversation):
            assert len(set(tagged_phrases(answer))) == 1
        named = [mask.rle for mask in conversation.masks]
        drawn = [mask.rle for mask in example.masks if mask.rle in named]
        orders[named == drawn] += 1
    assert orders[False] > orders[True]
