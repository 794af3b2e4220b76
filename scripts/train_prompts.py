"""
Train a checkpoint for clicks and boxes with the parts that do not change computed once, several times faster than
train.py: SAM's prompt encoder and mask decoder, the mask feedback and the span projector are trained, and the images
and answers of a fixed set of examples are encoded in advance (windows of a model with `correction_window` in each
step). `--keep` averages the weights after and before.

    python scripts/train_prompts.py recipes/clicks_plum_tiny.yaml --batches 200

The recipe and further options are those of train.py. Answers of the model stay exactly as they are.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_scheduler, set_seed

from backbones_plum import PlumImages
from modules_plum import mask_losses
from plum_partonomy.command_line import run_command
from plum_partonomy.files import write_whole
from plum_partonomy.hub.model_card import write_recipe
from plum_partonomy.training.examples import Collator
from plum_partonomy.training.mixture import load_records, mix
from plum_partonomy.training.model import freeze, load_model
from plum_partonomy.training.options import option_names, parse_arguments, read_options
from plum_partonomy.training.run import make_train_dataset
from plum_partonomy.training.trainer import MuonWithAdamW
from segmenters_plum import upscale_masks
from supervision_plum import MAX_PROMPT_ROUNDS, PROMPT_DRAWS, supervise_masks

OF_IMAGES = ("input_ids", "attention_mask", "sam_image_index", "original_sizes", "reshaped_input_sizes")
OF_MASKS = ("spans", "span_groups", "mask_groups", "sam_image_index")


@torch.no_grad()
def encode_examples(
    model, dataset, collator: Collator, *, batches: int, batch_size: int, workers: int = 0
) -> Iterator[dict]:
    """
    Yield batches of spans and masks with hidden states, image embeddings and the sizes of each span's image, all on
    the device of the model. Each pass over the data set is an epoch of it, with other augmentation.
    """
    for batch in tqdm(
        load_batches(dataset, collator, batches, batch_size, workers), desc="encoding", unit="batch", total=batches
    ):
        masks = [mask.bool().to(model.device) for mask in batch.pop("mask_labels")]
        batch = {name: batch[name].to(model.device) for name in {*OF_IMAGES, *OF_MASKS, "sam_pixel_values"}}
        embeddings = model.get_image_embeddings(batch["sam_pixel_values"])
        inputs = {name: batch[name] for name in OF_IMAGES}
        states = model.encode_conversations(sam_image_embeddings=embeddings, **inputs)
        sizes = batch["original_sizes"], batch["reshaped_input_sizes"]
        images = PlumImages({}, embeddings, batch["sam_image_index"], *sizes)
        kept = {name: batch[name] for name in OF_MASKS}
        encoded = {"hidden_states": states, "sam_image_embeddings": embeddings, "mask_labels": masks}
        pixels = None if model.config.correction_window is None else batch["sam_pixel_values"]
        yield {**kept, **encoded, "sam_pixels": pixels, "sizes": images.sizes_of(batch["spans"])}


def load_batches(dataset, collator: Collator, batches: int, batch_size: int, workers: int) -> Iterator[dict]:
    """Yield a number of batches of the data set in random order, of as many epochs as they need."""
    for epoch in count():
        dataset.set_epoch(epoch)
        order = [indices.tolist() for indices in torch.randperm(len(dataset)).split(batch_size)[:batches]]
        yield from DataLoader(dataset, batch_sampler=order, collate_fn=collator, num_workers=workers)
        batches -= len(order)
        if not batches:
            return


def compute_loss(model, batch: dict, **drawn: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    Return the weighted mask losses of own and prompted decodes, those of `forward`, and the mean IoUs of both. `drawn`
    is the result of [`draw`].
    """
    spans, sizes = batch["spans"], batch["sizes"]
    groups = {name: batch[name] for name in ("span_groups", "mask_groups")}
    given = model.config, batch["mask_labels"], sizes, batch["sam_pixels"]
    targets, sampled = supervise_masks(*given, **groups, **drawn)
    inputs = batch["hidden_states"], spans, batch["sam_image_embeddings"], batch["sam_image_index"]
    own = model.decode_masks(*inputs, targets=targets, sampled=sampled)
    _, masks, *labelled = sampled.with_own(*own, batch["mask_labels"], sizes)
    losses = mask_losses(model.config, masks, *labelled, torch.tensor(float(len(masks)), device=masks.device))
    ious = measure_ious(masks.detach(), *labelled[1:], model.config.sam_image_size)
    figures = {"own": ious[: len(spans)].mean(), "prompted": ious[len(spans) :].mean()}
    return sum(model.loss_weights[name] * value for name, value in losses.items()), figures


def measure_ious(masks: torch.Tensor, labels: list[torch.Tensor], sizes: torch.LongTensor, image_size: int):
    """Return the IoU `(S,)` of each mask with its label, at the size of the label; arguments as in `mask_losses`."""
    ious = []
    for mask, label, size in zip(masks, labels, sizes.tolist(), strict=True):
        found = upscale_masks(mask[None].float(), image_size, size[2:], label.shape)[0] > 0
        ious.append((found & label).sum() / (found | label).sum().clamp(min=1))
    return torch.stack(ious)


def draw(spans: torch.LongTensor, teacher_forcing_probability: float) -> dict[str, torch.Tensor]:
    """Return the random arguments of [`compute_loss`] for the spans of a batch, all of which are prompted."""
    drawn = {
        "teacher_forced": torch.rand(len(spans)) < teacher_forcing_probability,
        "prompt_rounds": torch.randint(1, MAX_PROMPT_ROUNDS + 1, (len(spans),)),
        "prompt_draws": torch.rand(len(spans), PROMPT_DRAWS),
    }
    return {name: values.to(spans.device) for name, values in drawn.items()}


def main(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, required=True, help="Number of batches to encode.")
    parser.add_argument(
        "--keep", type=float, default=0.0, help="Share of the weights before the training in the saved ones (WiSE-FT)."
    )
    own, rest = parser.parse_known_args(argv)
    model_arguments, data, args = parse_arguments(rest)
    set_seed(args.seed)
    parts = [load_records(source, source.train_split, streaming=False) for source in data.sources]
    records = mix(parts, [source.rate for source in data.sources], args.seed)
    model, processor = load_model(model_arguments, records)
    freeze(model.to(args.device).eval(), model_arguments.frozen_modules)
    dataset = make_train_dataset(records, parts, data, args.seed)
    collator = Collator(processor, order_free_targets=data.order_free_targets)
    amount = {"batches": own.batches, "batch_size": args.per_device_train_batch_size}
    batches = list(encode_examples(model, dataset, collator, **amount, workers=args.dataloader_num_workers))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    rates = (
        args.muon_learning_rate,
        args.learning_rate,
        args.weight_decay,
        (args.adam_beta1, args.adam_beta2),
        args.adam_epsilon,
    )
    optimizer = MuonWithAdamW(model, *rates)
    scheduler = get_scheduler(
        args.lr_scheduler_type, optimizer, args.warmup_steps, args.max_steps, args.lr_scheduler_kwargs
    )
    history, progress = [], tqdm(range(args.max_steps), desc="training", unit="step")
    for step in progress:
        batch = batches[int(torch.randint(len(batches), ()))]
        loss, figures = compute_loss(model, batch, **draw(batch["spans"], data.teacher_forcing_probability))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        scheduler.step()
        history.append({"loss": loss.detach(), **figures})
        if (step + 1) % args.logging_steps == 0:
            last = history[-args.logging_steps :]
            progress.set_postfix({name: f"{sum(line[name] for line in last) / len(last):.3f}" for name in last[0]})
    with torch.no_grad():  # a mean of both keeps more of what the model could do before (arXiv 2109.01903)
        for name, weight in before.items():
            model.get_parameter(name).lerp_(weight, own.keep)
    folder = Path(args.output_dir)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_recipe(folder, read_options(rest))
    history = [{name: float(value) for name, value in line.items()} for line in history]
    write_whole(folder / "history.json", [json.dumps(history), "\n"])
    print(f"The trained model, its processor and the losses of each step are in {folder}")


if __name__ == "__main__":
    run_command("train_prompts.py", lambda: main(sys.argv[1:]), option_names())
