"""
PLUM as a pipeline of transformers; its task is written into the config of every checkpoint, so that

    pipe = pipeline(model="user/plum", trust_remote_code=True)
    pipe({"image": "bike.png", "text": "Which parts does it have?"}, max_new_tokens=64)

answers {"generated_text": "It has a wheel ...", "segments": [{"label": "wheel", "start": 9, "end": 14, "score": 0.9,
"box": (3, 40, 38, 77), "mask": <PIL image>}]}. A list is answered by a list, and a generator or a data set by a
generator that asks for no more inputs than it needs; `batch_size` inputs run at a time, of any mixture of image sizes.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

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
    An input is `{"image": ..., "text": question}` (an image of any form that the processor reads, or no image) or a
    conversation as for `PlumProcessor.apply_chat_template` that ends with the user. A segment's `start` and `end` are
    characters of the text, its `box` is `(x0, y0, x1, y1)` in pixels or None, its `mask` an image of 0 and 255 of the
    size of the input. `mask_threshold` is a logit; other options are those of `generate`.
    """

    _load_processor = True
    _load_tokenizer = _load_image_processor = _load_feature_extractor = False

    def _sanitize_parameters(self, mask_threshold: float | None = None, **generate_options):
        options = {} if mask_threshold is None else {"mask_threshold": mask_threshold}
        return {}, options | generate_options, {}

    def preprocess(self, inputs) -> list[dict]:
        """The conversation of one input."""
        if isinstance(inputs, dict):
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
        outputs = self.model.segment(**batch.to(self.device), **generate_options)
        return self.processor.post_process_segmentation(outputs, mask_threshold=mask_threshold)

    def postprocess(self, answer) -> dict:
        segments = [
            {
                **{"label": span.text, "start": span.start, "end": span.end, "score": span.score},
                **{"box": span.box, "mask": Image.fromarray(span.mask).convert("L")},
            }
            for span in answer.spans
        ]
        return {"generated_text": answer.text, "segments": segments}

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


__all__ = ["PlumPipeline"]
