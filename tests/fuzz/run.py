"""
Runs one target of tests/fuzz/targets.py under atheris, seeded with small valid files.

    python tests/fuzz/run.py span_tags -max_total_time=75

The options after the target's name are libFuzzer's. An input that raises anything but the documented error ends the
run and is left in the working folder as crash-*.
"""

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))

INSTRUMENTED = ["plum_partonomy", "inputs_plum", "chats_plum", "tests.fuzz"]
with atheris.instrument_imports(include=INSTRUMENTED):
    from tests.fuzz.seeds import seeds_of
    from tests.fuzz.targets import TARGETS


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python tests/fuzz/run.py {{{','.join(TARGETS)}}} [libFuzzer options]")
    name = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds_of(name)):
            (Path(corpus) / str(number)).write_bytes(seed)
        atheris.Setup([*sys.argv, corpus], lambda data: TARGETS[name](data) and None)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
