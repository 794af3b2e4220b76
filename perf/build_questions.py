"""Measure time, rate and peak memory of making questions for a data set of a given size.

    python perf/build_questions.py --images 75000 --objects 600 --scheme official --processes 2
    python perf/build_questions.py --images 5000 --processes 1

The data set is synthetic: families of ten objects, each with its own parts and parts of its family, each part with its
own visibility rate. All images share one mask, so only making questions is measured, not reading masks. The
fingerprint does not depend on the number of processes.
"""

import hashlib
import multiprocessing
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from measure import result
from transformers import HfArgumentParser

from plum_partonomy.masks import encode
from plum_partonomy.questions.maker import QuestionMaker
from plum_partonomy.questions.part_statistics import collect_knowledge
from plum_partonomy.questions.wording import with_article
from plum_partonomy.records import PartExample, PartMask
from plum_partonomy.seeding import seeded_generator

FAMILY = 10
PARTS_PER_OBJECT = (4, 12)
IMAGES_PER_TASK = 250
SHARED_MASK = encode(np.eye(64, dtype=bool))


@dataclass
class Options:
    images: int = field(default=5_000, metadata={"help": "Number of images, one object each."})
    objects: int = field(default=600, metadata={"help": "Number of object labels."})
    parts: int = field(default=975, metadata={"help": "Number of part names."})
    scheme: str = field(default="official", metadata={"help": "official or balanced."})
    processes: int = field(default=1, metadata={"help": "Worker processes."})
    seed: int = 0


class SyntheticDataset:
    def __init__(self, options: Options):
        rng = seeded_generator(options.seed, "synthetic data set")
        names = [f"part {number}" for number in range(options.parts)]
        self.seed, self.rates, self.instance_graph = options.seed, {}, {}
        for number in range(options.objects):
            if number % FAMILY == 0:
                pool = rng.choice(options.parts, min(3 * FAMILY, options.parts), replace=False)
            members = rng.choice(pool, rng.integers(*PARTS_PER_OBJECT), replace=False)
            label = f"object {number}"
            self.rates[label] = {names[member]: float(rng.choice([0.5, 0.7, 0.9])) for member in members}
            self.instance_graph.setdefault(f"family {number // FAMILY}", []).append(label)
        self.labels = list(self.rates)
        self.part_graph = {label: sorted(rates) for label, rates in self.rates.items()}

    def annotation(self, index: int) -> tuple[str, list[str]]:
        rng = np.random.default_rng((self.seed, index))
        rates = self.rates[self.labels[index % len(self.labels)]]
        visible = [part for part, draw in zip(rates, rng.random(len(rates)), strict=True) if draw < rates[part]]
        return self.labels[index % len(self.labels)], visible or list(rates)[:1]

    def example(self, index: int) -> PartExample:
        label, visible = self.annotation(index)
        masks = [PartMask(part, SHARED_MASK) for part in visible]
        return PartExample(None, f"image-{index:06d}", label, masks, "synthetic", "none")


def main(options: Options) -> None:
    started = time.perf_counter()
    dataset = SyntheticDataset(options)
    knowledge = collect_knowledge(
        map(dataset.annotation, range(options.images)),
        part_graph=dataset.part_graph,
        instance_graph=dataset.instance_graph,
    )
    maker = QuestionMaker(knowledge, scheme=options.scheme, seed=options.seed)
    with_article("object")  # loads the rules of English articles
    start_seconds = time.perf_counter() - started

    starts = range(0, options.images, IMAGES_PER_TASK)
    tasks = [range(start, min(start + IMAGES_PER_TASK, options.images)) for start in starts]
    digest, questions = hashlib.sha256(), 0
    for task_digest, task_questions in _results(dataset, maker, tasks, processes=options.processes):
        digest.update(task_digest)
        last_digest = task_digest
        questions += task_questions
    seconds = time.perf_counter() - started

    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peaks = [resource.getrusage(usage).ru_maxrss / 1024**2 for usage in who]
    cpu_seconds = sum(resource.getrusage(usage).ru_utime + resource.getrusage(usage).ru_stime for usage in who)
    detail = {
        "unit": "images per second, once started",
        "images": options.images,
        "objects": options.objects,
        "scheme": options.scheme,
        "processes": options.processes,
        "questions": questions,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "seconds_to_start": round(start_seconds, 1),
        "peak_gib": round(peaks[0], 2),
        "peak_gib_of_a_worker": round(peaks[1], 2) if options.processes > 1 else None,
        "fingerprint": digest.hexdigest()[:16],
    }
    name = f"questions made for {options.images} images"
    equal = _make(tasks[-1])[0] == last_digest  # made again, here, without those before
    result(name, options.images / (seconds - start_seconds), None, equal=equal, detail=detail)


def _results(
    dataset: SyntheticDataset, maker: QuestionMaker, tasks: list[range], *, processes: int
) -> Iterator[tuple[bytes, int]]:
    _set_up(dataset, maker)
    if processes == 1:
        yield from map(_make, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(processes, initializer=_set_up, initargs=(dataset, maker)) as pool:
        yield from pool.imap(_make, tasks)


def _set_up(dataset: SyntheticDataset, maker: QuestionMaker) -> None:
    global _DATASET, _MAKER
    _DATASET, _MAKER = dataset, maker


def _make(task: range) -> tuple[bytes, int]:
    digest, questions = hashlib.sha256(), 0
    for index in task:
        for question in _MAKER.questions(_DATASET.example(index)):
            digest.update(f"{question.id} {question.correct} {question.choices} {question.object_choices}".encode())
            questions += 1
    return digest.digest(), questions


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    main(parsed)
