"""Small valid files of each kind, from which fuzzing starts."""

import json

import numpy as np

from partkit.masks import encode

_MASKS = [encode(mask) for mask in (np.eye(4, dtype=bool), np.zeros((4, 4), bool), np.ones((4, 4), bool))]

_PREDICTION = {
    "question_id": "1",
    "image_id": "a",
    "choice_scores": [0.5, 1.5],
    "given_spans": [{"text": "wing", "start": 0, "end": 1, "rle": _MASKS[0], "score": 0.5}],
    "true_tags": [[0, 1]],
    "predicted_tags": [[0, 1]],
    "generated_text": "a wing",
    "generated_spans": None,
}

_DESCRIPTOR = {
    "dataset_name": "one",
    "instances": [
        {
            "image_path": "1.png",
            "image_label": "boat",
            "segmentations": {
                "hull": [{"size": [4, 4], "counts": [4, 8, 4]}],
                "mast": [{"polygon": [0, 0, 3, 0, 3, 3], "size": [4, 4]}],
            },
            "segmentation_labels": ["hull", "mast"],
        }
    ],
    "part_graph": {"boat": ["hull", "mast"]},
    "instance_graph": {"vehicle": ["boat"]},
}

SEEDS = {
    "span_tags": [b"It has a <p>left wing</p> and a <p>tail</p>.", rb"a literal \<p> tag"],
    "run_length_encoding": [bytes([0, 3, 0, 3]) + mask["counts"].encode() for mask in _MASKS],
    "predictions_file": [json.dumps(_PREDICTION).encode() + b"\n"],
    "descriptor": [json.dumps(_DESCRIPTOR).encode()],
}
