"""Small valid files of each kind, from which fuzzing starts."""

import base64
import io
import json

import numpy as np
from PIL import Image

from inputs_plum import FORMATS
from plum_partonomy.masks import encode
from tests.fuzz.programs import CHECKPOINT_FILES, sound_checkpoint

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

_SQUARE = [[0, 0, 4, 0, 4, 3, 0, 3]]
_COCO = {
    "categories": [{"id": 1, "name": "hull", "supercategory": "boat"}, {"id": 2, "name": "mast"}],
    "images": [{"id": 7, "file_name": "1.png", "height": 4, "width": 6}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 1, "segmentation": _SQUARE},
        {"id": 2, "image_id": 7, "category_id": 2, "segmentation": {"size": [4, 6], "counts": [4, 8, 12]}},
    ],
}


def _image(file_format: str) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.arange(96, dtype=np.uint8).reshape(4, 8, 3)).save(content, file_format)
    return content.getvalue()


_PICTURE = io.BytesIO()
Image.new("L", (3, 2), 255).save(_PICTURE, "PNG")
_LABELME = {
    "imagePath": "1.png",
    "imageHeight": 4,
    "imageWidth": 6,
    "flags": {"boat": True, "car": False},
    "shapes": [
        {"label": "hull", "shape_type": "polygon", "points": [[0, 0], [4, 0], [4, 3]]},
        {"label": "mast", "shape_type": "rectangle", "points": [[0, 0], [4, 3]]},
        {"label": "sail", "shape_type": "circle", "points": [[2, 2], [3, 3]]},
        {
            "label": "flag",
            "shape_type": "mask",
            "points": [[1, 1], [3, 2]],
            "mask": base64.b64encode(_PICTURE.getvalue()).decode(),
        },
    ],
}
_CONVERSATION = {
    "id": "1",
    "image": "1.png",
    "messages": [
        {"role": "user", "content": "What carries the sail?"},
        {"role": "assistant", "content": "The <p>mast</p> on the <p>hull</p>."},
    ],
    "masks": [{"label": name, "rle": encode(np.eye(4, 6, dtype=bool))} for name in ("mast", "hull")],
}
_OLD_LABELME = {"imagePath": "1.png", "flags": None, "shapes": [{"label": "hull", "points": [[0, 0], [4, 0], [4, 3]]}]}

SEEDS = {
    "span_tags": [b"It has a <p>left wing</p> and a <p>tail</p>.", rb"a literal \<p> tag"],
    "run_length_encoding": [bytes([0, 3, 0, 3]) + mask["counts"].encode() for mask in _MASKS],
    "predictions_file": [json.dumps(_PREDICTION).encode() + b"\n"],
    "descriptor": [json.dumps(_DESCRIPTOR).encode()],
    "given_mask": [
        json.dumps(mask).encode()
        for mask in (
            encode(np.eye(4, 6, dtype=bool)),
            {"size": [4, 6], "counts": [4, 8, 12]},
            _SQUARE,
            np.eye(4, 6, dtype=int).tolist(),
            [np.eye(4, 6, dtype=bool).tolist()],
        )
    ],
    "image_file": [_image(file_format) for file_format in FORMATS],
    "coco_folder": [json.dumps(_COCO).encode(), json.dumps(_COCO).encode("utf-16")],
    "labelme_folder": [json.dumps(_LABELME).encode(), json.dumps(_OLD_LABELME).encode("utf-8-sig")],
    "conversation_file": [json.dumps(_CONVERSATION).encode() + b"\n\n"],
    "app_request": [
        json.dumps({"data": data, "fn_index": number, "session_hash": "SESSION"}).encode()
        for number, data in (
            (2, ["tiny", {"path": "IMAGE"}, "Which parts?", 0, 0.5]),
            (2, ["tiny", {"path": "IMAGE", "meta": {"_type": "gradio.FileData"}}, "Which parts?", 0.25, 0.75]),
            (4, [None, 0, 0.5]),
        )
    ],
}


def seeds_of(name: str) -> list[bytes]:
    """The files of a target's kind; those of a checkpoint are made when they are asked for."""
    if name != "checkpoint_folder":
        return SEEDS[name]
    files = enumerate(CHECKPOINT_FILES)
    return [bytes([number]) + (sound_checkpoint() / file_name).read_bytes() for number, file_name in files]
