"""A checkpoint that an earlier version saved, without any field of the segmenters: it loads to the same function."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.testing import assert_close

from modeling_plum import PlumForConditionalGeneration
from processing_plum import PlumProcessor
from tests.tiny import conversation

FOLDER = Path(__file__).parents[1] / "fixtures" / "checkpoint"


def test_the_stored_checkpoint_gives_the_masks_that_its_version_gave():
    expected = json.loads((FOLDER / "expected.json").read_text())
    model, report = PlumForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["parameters"]
    pixels = np.add.outer(3 * np.arange(50), 2 * np.arange(70))[..., None] * np.array([1, 2, 3]) % 256
    chat = conversation(Image.fromarray(pixels.astype(np.uint8)), "A <p>wing</p> and a <p>tail</p>.")
    processor = PlumProcessor.from_pretrained(FOLDER)
    batch = processor.apply_chat_template([chat], tokenize=True, return_dict=True)
    found = model.eval().segment_spans(**batch)
    assert_close(found.pred_masks.mean((1, 2)).tolist(), expected["mean_logits"], rtol=1e-3, atol=1e-5)
    assert_close(found.iou_scores.tolist(), expected["iou_scores"], rtol=1e-3, atol=1e-5)
