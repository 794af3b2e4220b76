"""
PLUM as a pipeline of transformers; its task is written into the config of every checkpoint, so that

    pipe = pipeline(model="user/plum", trust_remote_code=True)
    pipe({"image": "bike.png", "text": "Which parts does it have?"}, max_new_tokens=64)

answers {"generated_text": "It has a wheel ...", "is_truncated": False, "segments": [{"label": "wheel", "start": 9,
"end": 14, "score": 0.9, "box": (3, 40, 38, 77), "mask": <PIL image>}]}. A list is answered by a list, and a generator
or a data set (of torch or of `datasets`, streamed or not) by a generator that asks for no more inputs than it needs;
`batch_size` inputs run at a time, of any mixture of image sizes.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from PIL import Image
from transformers import Pipeline

TASK = "grounded-image-text-to-text"
CUSTOM_PIPELINES = {
    TASK: {
        "impl": "pipeline_plum.PlumPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}


class PlumPipeline(Pipeline):
    """
    An input is `{"image": ..., "text": question}` (an image of any form that the processor reads, or no image; further
    fields of a data set's rows are unused) or a conversation as for `PlumProcessor.apply_chat_template` that ends with
    the user. A segment's `start` and `end` are characters of the text, its `box` is `(x0, y0, x1, y1)` in pixels or
    None, its `mask` an image of 0 and 255 of the size of the input. `mask_threshold` is a logit; other options are
    those of `generate`.
    """

    _load_processor = True
    _load_tokenizer = _load_image_processor = _load_feature_extractor = False

    def _sanitize_parameters(self, mask_threshold: float | None = None, **generate_options):
        options = {} if mask_threshold is None else {"mask_threshold": mask_threshold}
        return {}, options | generate_options, {}

    def __call__(self, inputs, *args, **kwargs):
        return super().__call__(_stream_data_set(inputs), *args, **kwargs)

    def preprocess(self, inputs) -> list[dict]:
        """The conversation of one input."""
        if isinstance(inputs, dict):
            if not isinstance(inputs.get("text"), str):
                raise ValueError(f"An input needs a question as its 'text', found the fields {sorted(inputs)}.")
            content = [{"type": "text", "text": inputs["text"]}]
            if inputs.get("image") is not None:
                content.insert(0, {"type": "image", "image": inputs["image"]})
            return [{"role": "user", "content": content}]
        chat = list(getattr(inputs, "messages", inputs))
        if not chat or chat[-1]["role"] != "user":
            raise ValueError(f"A conversation must end with the user to be answered, found {len(chat)} messages.")
        return chat

    def _forward(self, chats: list[list[dict]], mask_threshold: float = 0.0, **generate_options) -> list:
        batch = self.processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, padding_side="left"
        )
        outputs = self.model.segment(**batch.to(self.model.device), **generate_options)
        return self.processor.post_process_segmentation(outputs, mask_threshold=mask_threshold)

    def postprocess(self, answer) -> dict:
        segments = [
            {
                **{"label": span.text, "start": span.start, "end": span.end, "score": span.score},
                **{"box": span.box, "mask": Image.fromarray(span.mask).convert("L")},
            }
            for span in answer.spans
        ]
        return {"generated_text": answer.text, "is_truncated": answer.is_truncated, "segments": segments}

    # Rows of a batch share images and have spans of their own number: they are batched as conversations, and neither
    # padded nor taken apart by the base class.
    def get_iterator(
        self, inputs: Iterable, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
    ) -> Iterator[dict]:
        chats = (self.preprocess(item, **preprocess_params) for item in inputs)
        while batch := list(islice(chats, batch_size)):
            yield from map(self.postprocess, self.forward(batch, **forward_params))

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params) -> dict:
        return next(self.get_iterator([inputs], 0, 1, preprocess_params, forward_params, postprocess_params))


def _stream_data_set(inputs):
    """A data set as a generator of its rows; anything else as it is."""
    if hasattr(inputs, "column_names") and hasattr(inputs, "features"):  # of `datasets`, which need not be installed
        return (row for row in inputs)
    if isinstance(inputs, torch.utils.data.IterableDataset):
        return (row for row in inputs)
    if isinstance(inputs, torch.utils.data.Dataset):
        return (inputs[i] for i in range(len(inputs)))
    return inputs


__all__ = ["PlumPipeline"]
