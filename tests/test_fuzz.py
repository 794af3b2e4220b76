"""Mutated files end in a result or in the documented error; fuzz/run.py searches further."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.seeds import SEEDS
from fuzz.targets import TARGETS

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
    assert all(TARGETS[name](seed) for seed in SEEDS[name])


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_mutated_file_is_read_or_refused_with_the_documented_error(name, data):
    content = data.draw(st.sampled_from(SEEDS[name]))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 12)))
        new = data.draw(st.sampled_from(INTERESTING) | st.binary(max_size=6))
        content = content[:start] + new + content[end:]
    assert TARGETS[name](content) in (True, False)
