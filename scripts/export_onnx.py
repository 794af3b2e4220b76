"""
Export the mask branch of a checkpoint, SAM with PLUM's mask feedback, to ONNX and compare the results:

    python scripts/export_onnx.py --model runs/mine --output_dir runs/mine_onnx

    encoder.onnx     pixels (1, 3, S, S) -> embedding (1, C, G, G)                              once for an image
    first_mask.onnx  embedding, query (1, C) -> mask (1, 4G, 4G), iou (1,), key, value (1, G*G, C)
    next_mask.onnx   embedding, query, keys (T, G*G, C), values -> the same                     T earlier masks, T >= 1

A query is the output of `span_projector` for the words of a span; the language side stays in torch. Later masks use
only the key and value of a mask. [`MaskSession`] combines the three files with onnxruntime.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

from modeling_plum import PlumForConditionalGeneration
from plum_partonomy.inference.checkpoint import load_checkpoint

STEP_OUTPUTS = ["mask", "iou", "key", "value"]
TOLERANCE = 1e-3
"""Maximum difference of a mask logit from torch's; logits are of the order of 10."""


class MaskSession:
    """Masks of an image from span queries, computed by the files of [`export`]."""

    def __init__(self, folder: Path):
        import onnxruntime

        self.encoder, self.first, self.next = (
            onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
            for name in ("encoder", "first_mask", "next_mask")
        )

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Return the embedding `(1, C, G, G)` of pixels `(1, 3, S, S)`, the processor's `sam_pixel_values`."""
        return self.encoder.run(["embedding"], {"pixels": pixels})[0]

    def decode(self, embedding: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return logits `(S, 4G, 4G)` and IoUs `(S,)` of queries `(S, C)` of one conversation, in order."""
        steps = []
        for query in queries[:, None]:
            inputs = {"embedding": embedding, "query": query}
            if not steps:
                steps.append(self.first.run(STEP_OUTPUTS, inputs))
                continue
            _, _, keys, values = (np.concatenate(earlier) for earlier in zip(*steps, strict=True))
            steps.append(self.next.run(STEP_OUTPUTS, inputs | {"keys": keys, "values": values}))
        masks, iou_scores, _, _ = (np.concatenate(outputs) for outputs in zip(*steps, strict=True))
        return masks, iou_scores


class _Encoder(nn.Module):
    def __init__(self, model: PlumForConditionalGeneration):
        super().__init__()
        self.sam, self.segmenter = model.sam, model.segmenter

    def forward(self, pixels):
        return self.segmenter.encode(self.sam, pixels)


class _MaskStep(nn.Module):
    """One step of `PlumForConditionalGeneration.decode_masks`, for one conversation."""

    def __init__(self, model: PlumForConditionalGeneration):
        super().__init__()
        self.sam, self.segmenter, self.mask_feedback = model.sam, model.segmenter, model.mask_feedback
        self.grid = model.config.sam_grid_size

    def forward(self, embedding, query, keys=None, values=None):
        if keys is None:
            dense = self.sam.prompt_encoder.no_mask_embed.weight[..., None, None].expand(1, -1, self.grid, self.grid)
        else:
            dense = self.mask_feedback(keys[None], values[None])
        positions = self.sam.get_image_wide_positional_embeddings()
        mask, iou_score = self.segmenter.decode(self.sam, embedding, positions, query[:, None], dense)
        return (
            mask,
            iou_score,
            *self.mask_feedback.embed(mask, query, positions, self.sam.prompt_encoder.mask_embed),
        )


@torch.no_grad()
def export(model: PlumForConditionalGeneration, folder: Path) -> None:
    """
    Write the three files, in float32.

    Raises:
        ValueError: The model has no mask feedback; its masks do not depend on each other, so export its SAM alone.
    """
    if model.mask_feedback is None:
        raise ValueError("The model has no mask feedback; export its sam alone.")
    model = model.float().eval()
    side, grid = model.config.sam_image_size, model.config.sam_grid_size
    width = model.config.sam_width
    channels = model.segmenter.embedding_width(model.config.sam_config)
    embedding, query = torch.rand(1, channels, grid, grid), torch.rand(1, width)
    # Two tensors: the same tensor twice would be exported as one input.
    keys, values = torch.rand(2, grid**2, width), torch.rand(2, grid**2, width)
    earlier = {0: torch.export.Dim("earlier", min=1)}
    step, names = _MaskStep(model).eval(), ["embedding", "query", "keys", "values"]
    folder.mkdir(parents=True, exist_ok=True)
    for name, module, inputs, inputs_names, outputs, dynamic in (
        ("encoder", _Encoder(model).eval(), (torch.rand(1, 3, side, side),), ["pixels"], ["embedding"], None),
        ("first_mask", step, (embedding, query), names[:2], STEP_OUTPUTS, None),
        (
            "next_mask",
            step,
            (embedding, query, keys, values.clone()),
            names,
            STEP_OUTPUTS,
            (None, None, earlier, earlier),
        ),
    ):
        torch.onnx.export(
            module,
            inputs,
            folder / f"{name}.onnx",
            input_names=inputs_names,
            output_names=outputs,
            dynamic_shapes=dynamic,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


@torch.no_grad()
def largest_difference(model: PlumForConditionalGeneration, folder: Path, spans: int = 4) -> float:
    """Return the largest difference of mask logits of random spans on a random image of torch and the files."""
    generator = torch.Generator().manual_seed(0)
    side = model.config.sam_image_size
    pixels = torch.randn(1, 3, side, side, generator=generator)
    states = torch.randn(1, spans, model.config.get_text_config().hidden_size, generator=generator)
    tokens = torch.tensor([[0, i, i + 1] for i in range(spans)])
    expected, _ = model.decode_masks(states, tokens, model.get_image_embeddings(pixels), torch.zeros(1, dtype=int))
    session = MaskSession(folder)
    masks, _ = session.decode(session.encode(pixels.numpy()), model.span_projector(states)[0].numpy())
    return float(np.abs(masks - expected.numpy()).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a PLUM checkpoint")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the three files")
    arguments = parser.parse_args()
    model, _ = load_checkpoint(arguments.model)
    export(model, arguments.output_dir)
    difference = largest_difference(model, arguments.output_dir)
    print(f"largest difference of a mask logit from torch: {difference:.1e}")
    if difference > TOLERANCE:
        raise SystemExit(f"The exported masks differ by more than {TOLERANCE}: do not use {arguments.output_dir}.")


if __name__ == "__main__":
    main()
