"""
segment() with plum-tiny: eight images of different sizes in a batch against one by one, and against generate().

    python perf/segmentation.py
"""

import torch
from measure import compare
from plum_tiny import QUESTION, build_plum_tiny, draw_images

from plum_partonomy.records import as_chat

TOKENS = 40


@torch.no_grad()
def main() -> list[dict]:
    model, processor = build_plum_tiny()
    question = [{"role": "user", "content": QUESTION}]
    chats = [as_chat(question, image) for image in draw_images(8)]
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}

    def encode(some):
        return processor.apply_chat_template(
            some, add_generation_prompt=True, tokenize=True, return_dict=True, padding_side="left"
        )

    def segment(some):
        answers = processor.post_process_segmentation(model.segment(**encode(some), **options))
        return [(answer.text, [torch.from_numpy(span.mask) for span in answer.spans]) for answer in answers]

    batch = encode(chats)
    outputs = model.segment(**batch, **options)

    def generate_and_decode():
        """Return answers and masks without the cost of tagging."""
        sequences = model.generate(**batch, **options)
        embeddings = model.get_image_embeddings(batch["sam_pixel_values"])
        states = torch.zeros(*sequences.shape, model.config.get_text_config().hidden_size)
        model.decode_masks(states, outputs.spans, embeddings, batch["sam_image_index"])
        return sequences

    results = []
    for count, target in ((2, None), (4, None), (8, 2.5)):
        results += compare(
            f"segment() of {count} images batched, plum-tiny",
            old=lambda count=count: [answer for chat in chats[:count] for answer in segment([chat])],
            new=lambda count=count: segment(chats[:count]),
            target=target,
            images=count,
            tokens=TOKENS,
            spans=len(outputs.spans),
        )
    return results + compare(
        "segment() against generate() and mask decoding, plum-tiny",
        old=generate_and_decode,
        new=lambda: model.segment(**batch, **options).sequences,
        target=1.10,
        better="lower",
        rounds=5,
        images=8,
        tokens=TOKENS,
        spans=len(outputs.spans),
    )


if __name__ == "__main__":
    main()
