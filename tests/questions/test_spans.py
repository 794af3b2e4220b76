import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plum_partonomy.questions.spans import join_parts, tag_phrases
from plum_partonomy.records import tagged_phrases

PREFIX = "The object in the image has the following visible parts: "
names = st.lists(
    st.text(alphabet="abc ", min_size=1).map(str.strip).filter(bool), min_size=1, max_size=6, unique=True
).map(sorted)


@given(names)
def test_removing_the_tags_gives_the_answer_back_and_the_tagged_phrases_are_the_parts(parts):
    text = PREFIX + join_parts(parts) + "."
    tagged = tag_phrases(text, parts)
    assert re.sub("</?p>", "", tagged) == text
    assert re.findall("<p>(.*?)</p>", tagged) == parts


def test_the_last_occurrence_is_tagged_when_the_object_is_called_like_its_part():
    text = "The wheel in the image has the following visible parts in common with a wheel: wheel."
    assert tag_phrases(text, ["wheel"]) == text[:-6] + "<p>wheel</p>."


def test_a_phrase_inside_a_longer_word_is_not_tagged():
    with pytest.raises(ValueError, match="list 'wing'.*found 'It has wings.'"):
        tag_phrases("It has wings.", ["wing"])


@pytest.mark.parametrize("phrases", [["mast", "hull"], ["hull", "keel"], ["hull", "mast", "sail"]])
def test_phrases_in_another_order_or_number_than_the_answer_lists_them_are_an_error(phrases):
    with pytest.raises(ValueError, match="Expected the answer to list"):
        tag_phrases(PREFIX + "hull, and mast.", phrases)


@pytest.mark.parametrize("phrases", [[], [""], ["hull", ""]])
def test_no_phrase_or_an_empty_phrase_is_an_error(phrases):
    with pytest.raises(ValueError, match="at least one phrase"):
        tag_phrases(PREFIX + "hull.", phrases)


def test_a_literal_tag_in_an_answer_is_escaped_and_grounds_nothing():
    tagged = tag_phrases(PREFIX + "<p>, and hull.", ["<p>", "hull"])
    assert tagged == PREFIX + r"<p>\<p></p>, and <p>hull</p>."
    assert tagged_phrases(tagged) == ["<p>", "hull"]
