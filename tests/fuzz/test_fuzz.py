"""Mutated files end in a result or in the documented error; tests/fuzz/run.py searches further."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.seeds import seeds_of
from tests.fuzz.targets import SLOW, TARGETS

INTERESTING = [
    b"",
    b"\x00",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"<p>",
    b"</p>",
    b"\\",
    b"\xff",
    b"\n",
]


@pytest.mark.parametrize("name", TARGETS)
def test_the_files_that_fuzzing_starts_from_are_valid(name):
    assert all(TARGETS[name](seed) for seed in seeds_of(name))


@st.composite
def mutated(draw, name: str) -> bytes:
    content = draw(st.sampled_from(seeds_of(name)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 12)))
        new = draw(st.sampled_from(INTERESTING) | st.binary(max_size=6))
        content = content[:start] + new + content[end:]
    return content


@pytest.mark.parametrize("name", TARGETS)
def test_a_mutated_file_is_read_or_refused_with_the_documented_error(name):
    @settings(max_examples=30 if name in SLOW else 150, deadline=None)
    @given(mutated(name))
    def check(content: bytes):
        assert TARGETS[name](content) in (True, False)

    check()
