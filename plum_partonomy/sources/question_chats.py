"""Convert PARTONOMY questions to conversations: the answer is the correct choice with its parts tagged.

The folder is that of the official release, see official.py. It is a benchmark: evaluate a model only on images that it
was not trained on.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from plum_partonomy.questions.grounding import answer_question
from plum_partonomy.records import GroundedConversation, Question
from plum_partonomy.seeding import seeded_generator
from plum_partonomy.sources.official import QUESTIONS_FILE, read_questions
from plum_partonomy.sources.untrusted import OnError, find_existing, refuse


class CoreConversations:
    """All questions of a folder, opened and checked."""

    name: ClassVar[str] = "core_conversations"
    published_counts: ClassVar[dict[str, dict[str, int]]] = {}

    def __init__(self, folder: str | Path, *, split: str = "train", on_error: OnError = refuse):
        """Raises DataError if the file is missing or damaged; `on_error` receives a DataError for each bad record."""
        self.split, self.blank, self.path = split, 0, Path(folder) / QUESTIONS_FILE
        self._groups = self.group(list(read_questions(folder, on_error=on_error)))

    @classmethod
    def splits(cls, folder: str | Path) -> list[str]:
        """Return ["train"]. Raises DataError if the file is missing."""
        find_existing(Path(folder), [QUESTIONS_FILE], what="the questions")
        return ["train"]

    @classmethod
    def record_paths(cls) -> set[str]:
        return {QUESTIONS_FILE}

    @staticmethod
    def group(questions: list[Question]) -> list[list[Question]]:
        """Return groups of questions; one question of each group becomes a conversation."""
        return [[question] for question in questions]

    @property
    def counts(self) -> dict[str, int]:
        return {"questions": len(self)}

    def __len__(self) -> int:
        return len(self._groups)

    def conversations(self, index: int, *, seed: int) -> Iterator[GroundedConversation]:
        """Yield the conversation about one question of the group, drawn by seed and image."""
        group = self._groups[index]
        rng = seeded_generator(seed, "question", group[0].image_id)
        yield answer_question(group[rng.integers(len(group))])


class CoreStage2(CoreConversations):
    """The data of the second stage of the published training: one question about each image, drawn from its
    identification, positive and negative questions that name the object.
    """

    name = "core_stage2"
    types = ("identification_with_label", "positive_with_label", "negative_with_label")

    @classmethod
    def group(cls, questions: list[Question]) -> list[list[Question]]:
        groups: dict[str, list[Question]] = {}
        for question in questions:
            if question.question_type in cls.types:
                groups.setdefault(question.image_id, []).append(question)
        return [sorted(groups[image_id], key=lambda question: question.question) for image_id in sorted(groups)]
