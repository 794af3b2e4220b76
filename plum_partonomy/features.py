"""Storage types of the records of records.py, in a separate module because importing `datasets` is slow."""

from datasets import Features, Image, List, Value

_MASKS = List({"label": Value("string"), "rle": {"size": List(Value("int32")), "counts": Value("string")}})

GROUNDED_CONVERSATION_FEATURES = Features(
    {
        "id": Value("string"),
        "image": Image(),
        "image_id": Value("string"),
        "image_label": Value("string"),
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "masks": _MASKS,
        "source": Value("string"),
        "licence": Value("string"),
    }
)

QUESTION_FEATURES = Features(
    {
        "id": Value("string"),
        "image": Image(),
        "image_id": Value("string"),
        "image_label": Value("string"),
        "question_type": Value("string"),
        "question": Value("string"),
        "choices": List(Value("string")),
        "correct": Value("int32"),
        "choice_parts": List(List(Value("string"))),
        "masks": _MASKS,
        "object_question": Value("string"),
        "object_choices": List(Value("string")),
        "object_classes": List(Value("string")),
        "object_correct": Value("int32"),
        "source": Value("string"),
        "licence": Value("string"),
    }
)
