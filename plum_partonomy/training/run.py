"""Run a training, from its options to the folder of the trained model; train.py and `plum train` call `main`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import set_seed

from plum_partonomy.hub.model_card import make_model_card, write_recipe
from plum_partonomy.inference.embedding_cache import EmbeddingCache
from plum_partonomy.masks import DataError
from plum_partonomy.training.examples import Collator, ConversationDataset, FreshConversationDataset, stream_examples
from plum_partonomy.training.fresh import open_fresh
from plum_partonomy.training.mixture import load_eval_records, load_records, mix
from plum_partonomy.training.model import add_lora, load_model, load_processor_alone, store_frozen
from plum_partonomy.training.options import (
    METRICS,
    DataArguments,
    ModelArguments,
    PlumTrainingArguments,
    evaluates,
    parse_arguments,
    read_options,
)
from plum_partonomy.training.preview import count_records, format_table, survey, write_samples
from plum_partonomy.training.resume import check_output_folder, describe_run, find_checkpoint
from plum_partonomy.training.trainer import PlumTrainer, TrainingCurves


def main(argv: list[str]):
    model_arguments, data_arguments, args = parse_arguments(argv)
    if not data_arguments.dry_run:
        check_output_folder(args)
    set_seed(args.seed)

    # Data
    sources, streaming = data_arguments.sources, data_arguments.streaming
    parts = [load_records(source, source.train_split, streaming) for source in sources]
    run = describe_run(model_arguments, data_arguments, args, parts)
    checkpoint = find_checkpoint(args, run)
    train_records = mix(parts, [source.rate for source in sources], args.seed)
    train_dataset = make_train_dataset(train_records, parts, data_arguments, args.seed)
    turns_per_record, max_length = data_arguments.turns_per_record, data_arguments.max_length
    eval_dataset = make_eval_dataset(data_arguments, args) if evaluates(args) else None

    # Model
    model, processor = None, load_processor_alone(model_arguments) if data_arguments.dry_run else None
    if processor is None:
        model, processor = load_model(model_arguments, train_records)
    if args.process_index == 0:
        rows = survey(sources, parts, processor, max_length=max_length, turns_per_record=turns_per_record)
        print(format_table(rows), flush=True)
        if data_arguments.dry_run:
            samples = Path(args.output_dir, "samples.html")
            write_samples(samples, rows, train_dataset, seed=args.seed)
            print(f"Samples of the data: {samples}")
    if data_arguments.dry_run:
        return
    if model_arguments.lora_r:
        model = add_lora(model, model_arguments)
    if model_arguments.frozen_dtype is not None:
        store_frozen(model, getattr(torch, model_arguments.frozen_dtype))

    # Training
    embedding_cache = open_embedding_cache(model, data_arguments)
    trainer = PlumTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=Collator(processor, max_length, order_free_targets=data_arguments.order_free_targets),
        processing_class=processor,
        callbacks=[TrainingCurves()],
        embedding_cache=embedding_cache,
        run=run,
    )
    if embedding_cache is not None and trainer.is_world_process_zero():
        images = None if streaming else len(train_dataset) + len(eval_dataset or [])
        print(embedding_cache.describe(images))
    trainer.train(resume_from_checkpoint=checkpoint)
    save_result(trainer, model_arguments, argv)


def save_result(trainer: PlumTrainer, arguments: ModelArguments, argv: list[str]):
    """Save the trained model in float32, its adapter merged, with its processor, recipe and card."""
    folder = Path(trainer.args.output_dir)
    if arguments.frozen_dtype is not None and trainer.is_world_process_zero():
        trainer.model.cpu().float()  # bfloat16 would round an adapter's small changes away
    if arguments.lora_r:
        trainer.merge_adapter()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_recipe(folder, read_options(argv))
        make_model_card(folder).save(folder / "README.md")
        print(f"The trained model, its processor and its curves are in {folder}")
    if trainer.args.push_to_hub:
        trainer.push_to_hub("Card and recipe")


def make_train_dataset(
    records: Dataset | IterableDataset, parts: Sequence[Dataset | IterableDataset], arguments: DataArguments, seed: int
) -> torch.utils.data.Dataset | IterableDataset:
    """
    Return the training examples.

    Args:
        records: All records, mixed.
        parts: The records of each source, used by `fresh_records` to make new ones.
    """
    options = {
        "seed": seed,
        "jitter": arguments.color_jitter,
        "crop": arguments.random_crop,
        "affine": arguments.random_affine,
        "turns_per_record": arguments.turns_per_record,
        "follow_up_probability": arguments.follow_up_probability,
        "max_spans": arguments.max_spans,
        "teacher_forcing_probability": arguments.teacher_forcing_probability,
        "prompt_probability": arguments.prompt_probability,
    }
    if arguments.streaming:
        return stream_examples(records, **options)
    if not arguments.fresh_records:
        return ConversationDataset(records, **options)
    places = [Dataset.from_dict({"part": [i] * len(part), "row": range(len(part))}) for i, part in enumerate(parts)]
    makers = [
        open_fresh(source, part, mirror=arguments.mirror)
        for source, part in zip(arguments.sources, parts, strict=True)
    ]
    mixed = mix(places, [source.rate for source in arguments.sources], seed)
    return FreshConversationDataset(mixed, makers, **options)


def make_eval_dataset(arguments: DataArguments, args: PlumTrainingArguments) -> ConversationDataset:
    """
    Return the examples for validation.

    Raises:
        DataError: Turns, tags and masks of a record do not match, which would otherwise stop the run at its first
            evaluation; or the records have no value of the metric that selects checkpoints.
    """
    records = load_eval_records(arguments.sources, arguments.streaming)
    count_records(records)
    metric = args.metric_for_best_model.removeprefix("eval_")
    selects = args.load_best_model_at_end or args.save_strategy == "best"
    if selects and metric != METRICS[-1] and not any(records["masks"]):
        raise DataError(
            f"metric_for_best_model={metric} needs masks, which no record of the eval_split has; set it to "
            f"{METRICS[-1]}."
        )
    return ConversationDataset(records, turns_per_record=None if arguments.turns_per_record is None else 0)


def open_embedding_cache(model: nn.Module, arguments: DataArguments) -> EmbeddingCache | None:
    """Return the cache if the options request one. Raises `DataError` if embeddings change during the training."""
    if arguments.cache_image_embeddings is None:
        return None
    for name, part in model.segmenter.image_encoder(model.sam).items():
        weights = [part] if isinstance(part, nn.Parameter) else part.parameters()
        if any(weight.requires_grad for weight in weights):
            raise DataError(
                f"cache_image_embeddings needs a frozen image encoder; add sam.{name} to frozen_modules, or remove "
                "it from lora_trained_whole."
            )
    changes = {name: getattr(arguments, name) for name in ("color_jitter", "random_crop", "random_affine")}
    if any(changes.values()):
        raise DataError(
            "cache_image_embeddings needs unchanged images; set color_jitter, random_crop and random_affine to 0, "
            f"found {', '.join(map(str, changes.values()))}."
        )
    return EmbeddingCache(arguments.cache_image_embeddings, model)
