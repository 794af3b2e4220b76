"""The file that answers at an endpoint, called as the Hub's inference toolkit calls it."""

import base64
import importlib.util
import io
import json

import numpy as np
import pytest

from plum_partonomy.hub import handler
from plum_partonomy.masks import decode, encode
from tests.tiny import random_image, random_mask, tiny_model, tiny_processor


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    """The handler of a repository: the file beside the weights."""
    folder = tmp_path_factory.mktemp("repository")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    spec = importlib.util.spec_from_file_location("handler", handler.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(folder))


def test_a_request_with_an_image_is_answered_by_text_and_masks_that_fit_into_json(endpoint):
    content = io.BytesIO()
    random_image().save(content, format="PNG")
    image = base64.b64encode(content.getvalue()).decode()
    asked = {"image": image, "text": "Which parts can you see?"}
    answer = endpoint({"inputs": asked, "parameters": {"max_new_tokens": 12}})
    assert json.loads(json.dumps(answer)) == answer
    direct = endpoint.pipe({"image": random_image(), "text": asked["text"]}, max_new_tokens=12)
    assert answer["generated_text"] == direct["generated_text"]
    assert len(answer["segments"]) == len(direct["segments"]) > 0
    for segment, expected in zip(answer["segments"], direct["segments"], strict=True):
        np.testing.assert_array_equal(decode(segment["rle"]), np.asarray(expected["mask"]) > 0)


def test_a_request_without_a_question_is_refused(endpoint):
    for inputs in (None, {"image": "x.png"}, "Which parts?"):
        with pytest.raises(ValueError, match="Expected .*inputs.*a question"):
            endpoint({"inputs": inputs})


@pytest.mark.parametrize("seed", range(4))
def test_run_lengths_are_those_of_coco(seed):
    for mask in (random_mask(seed=seed), ~random_mask(seed=seed), np.ones((3, 2), bool), np.zeros((3, 2), bool)):
        found = handler.encode(mask)
        np.testing.assert_array_equal(decode(found), mask)
        assert encode(decode(found)) == encode(mask)
