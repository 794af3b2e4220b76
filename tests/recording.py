"""Tensors recorded from the authors' code, the model converted from their weights, and their batches as ours."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from modeling_plum import PlumForConditionalGeneration
from modules_plum import decode_spans
from scripts.convert_original_plum import build, convert, plan_conversion

PUBLIC_FOLDER = Path(__file__).parent / "fixtures" / "parity"


class Recording:
    """
    A folder of recorded tensors, `parity_<set>.json` beside them; `README.md` there says what is recorded.

    Args:
        folder: Read only.
        work_dir: Where the converted model goes.
    """

    def __init__(self, folder: Path, work_dir: Path):
        (description,) = folder.glob("parity_*.json")
        self.folder = folder
        self.description = json.loads(description.read_text())
        self.options = self.description["config"]
        self.checkpoint, self.config_file, self.converted = (
            work_dir / name for name in ("original", "options.json", "converted")
        )
        self.checkpoint.mkdir()
        for path in folder.glob("weights_*.safetensors"):
            if path.stem != "weights_teacher":
                (self.checkpoint / path.name).symlink_to(path.resolve())
        self.config_file.write_text(json.dumps(self.options))
        convert(self.checkpoint, self.converted, config_file=self.config_file)

    def load(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def expand(self, ids: torch.Tensor, values: torch.Tensor, fill: int | None = None) -> torch.Tensor:
        """
        Rows of token values with those of the image placeholder repeated for each of its tokens, as a processor here
        expands them; or with `fill` in their place.
        """
        rows = []
        for row_ids, row in zip(ids, values, strict=True):
            is_image = row_ids == self.options["special_ids"]["image_placeholder"]
            counts = torch.where(is_image, self.options["num_image_tokens"], 1)
            rows.append((row if fill is None else row.masked_fill(is_image, fill)).repeat_interleave(counts))
        return torch.stack(rows)

    def expand_tags(self, tags: torch.Tensor) -> torch.Tensor:
        """O/B/I per token as the original expands them: zeros before the row, which moves what follows the image."""
        return F.pad(tags, (self.options["num_image_tokens"] - 1, 0))

    def text_inputs(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        image_token = self.options["llm"]["vocab_size"]  # the row after those of the original
        return {
            "input_ids": self.expand(ids, ids, fill=image_token),
            "attention_mask": self.expand(ids, attention_mask),
        }

    def training_batch(self) -> dict:
        """
        The recorded training batch as ours. Where the recording leaves its images out, what the original made of them
        stands in: SAM's embeddings and the language model's input embeddings.
        """
        inputs, about = self.load("train_inputs"), self.description["train"]
        span_labels = self.expand_tags(inputs["per_token_labels"])
        images = torch.arange(len(inputs["offset"]) - 1).repeat_interleave(inputs["offset"].diff())
        batch = {
            **self.text_inputs(inputs["input_ids"], inputs["attention_masks"]),
            "labels": self.expand(inputs["input_ids"], inputs["labels"], fill=-100),
            "span_labels": span_labels,
            "sam_image_index": images,
            "original_sizes": torch.tensor(about["original_sizes"]),
            "reshaped_input_sizes": torch.tensor(about["resize_list"]),
        }
        masks = [inputs.get(f"masks.{i}", torch.empty(0)) for i in range(len(about["n_masks"]))]
        batch["spans"], batch["mask_labels"] = assign_masks(decode_spans(span_labels), images, masks)
        if "images" in inputs:
            batch |= {"pixel_values": inputs["images_clip"][images], "sam_pixel_values": inputs["images"]}
        else:
            outputs = self.load("train_full")
            embeddings = [outputs[f"sam_image_embeddings.{i}"] for i in range(len(masks))]
            batch |= {"inputs_embeds": outputs["inputs_embeds"], "sam_image_embeddings": torch.cat(embeddings)}
        return batch

    def evaluation_batch(self) -> dict:
        """The recorded rows of one question, an answer each, about one image."""
        inputs, about = self.load("eval_inputs"), self.description["eval"]
        ids = inputs["input_ids"]
        return {
            **self.text_inputs(ids, inputs["attention_masks"]),
            "pixel_values": inputs["images_clip"].expand(len(ids), -1, -1, -1),
            "sam_pixel_values": inputs["images"],
            "sam_image_index": torch.zeros(len(ids), dtype=torch.long),
            "original_sizes": torch.tensor([about["original_size"]]),
            "reshaped_input_sizes": torch.tensor([about["resize"]]),
        }


def assign_masks(
    spans: torch.Tensor, images: torch.Tensor, masks: list[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """
    The spans that have a mask, and their masks. As many masks as conversations of an image: one for all spans of each
    conversation; otherwise one for the k-th span of each conversation; no mask: the spans are left out.
    """
    kept, assigned = [], []
    for index, (row, _, _) in enumerate(spans.tolist()):
        image = int(images[row])
        own, conversations = masks[image], (images == image).nonzero()[:, 0].tolist()
        if len(own):
            number = int((spans[:index, 0] == row).sum())
            kept.append(index)
            assigned.append(own[conversations.index(row) if len(own) == len(conversations) else number])
    return spans[kept], assigned


def original_gradients(recording: Recording, model: PlumForConditionalGeneration) -> tuple[dict, dict]:
    """
    After a backward pass: (found, recorded) gradients by name here, and the gradients of parameters that the original
    trained but recorded none of.
    """
    recorded = recording.load("train_full_grads")
    frozen = {*recording.description["train"]["grad_none_params"], "lm_head.weight", "model.embed_tokens.weight"}
    parameters = dict(model.named_parameters())
    compared, unrecorded = {}, {}
    for name, recipe in plan_conversion(model.config, parameters).items():
        # A projector of one linear layer ends in an identity here, which has no gradient there; SAM's positional
        # matrix is a constant there and a parameter in transformers.
        if name.startswith("vlm.model.multi_modal_projector.linear_2.") or name.endswith(".positional_embedding"):
            continue
        found = parameters[name].grad
        if recipe.sources[0] in recorded:
            compared[name] = (found, build(recipe, recorded.get))
        elif recipe.sources[0] not in frozen and found is not None:
            unrecorded[name] = found
    rows = recorded["__embed_grad_rows__.ids"]
    embeddings = model.get_input_embeddings().weight.grad
    compared["embeddings of the used ids"] = (embeddings[rows], recorded["__embed_grad_rows__.grad"])
    return compared, unrecorded
