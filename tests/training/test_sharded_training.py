"""
FSDP2 as recipes/accelerate/fsdp2.yaml asks for it, in two processes on CPU: the same training as in one process, of
all weights and with LoRA, with a frozen teacher, and with LoRA from cached image embeddings that are missing at first.

Run as a script by `accelerate launch` the module makes the sharded runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModel

from plum_partonomy.inference.embedding_cache import EmbeddingCache
from plum_partonomy.training.examples import Collator, ConversationDataset
from plum_partonomy.training.model import add_lora, store_frozen
from plum_partonomy.training.options import ModelArguments, PlumTrainingArguments
from plum_partonomy.training.trainer import PlumTrainer
from tests.runs import ROOT, make_records, record, uneven_records
from tests.tiny import tiny_model, tiny_processor

CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


def run(
    folder: Path,
    *,
    processes: int,
    lora_r: int,
    resume: Path | None = None,
    tied: bool = False,
    frozen_dtype: torch.dtype = torch.float32,
) -> dict:
    """Three steps of four uneven rows each, in which ranks differ in images and spans; the figures at the end."""
    args = PlumTrainingArguments(
        str(folder),
        learning_rate=0.003,
        max_steps=3,
        per_device_train_batch_size=4 // processes,
        per_device_eval_batch_size=4,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    sharded = processes > 1
    if sharded:
        assert args.world_size == processes
        # accelerate shards over GPUs only; these processes do as if they had some.
        PartialState().distributed_type = DistributedType.MULTI_GPU
    model = tiny_model(teacher_kl_loss_weight=1.0)
    for parameter in model.mask_feedback.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.config.get_text_config().tie_word_embeddings = tied
    if lora_r:
        model = add_lora(model, ModelArguments(model="unused", lora_r=lora_r, lora_dropout=0.0))
    store_frozen(model, frozen_dtype)
    embedding_cache = EmbeddingCache(folder / "embeddings", model) if lora_r else None
    trainer = PlumTrainer(
        model=model,
        args=args,
        train_dataset=ConversationDataset(uneven_records(), seed=3),
        eval_dataset=ConversationDataset(make_records([record(number, number % 4) for number in range(30, 37)])),
        data_collator=Collator(tiny_processor()),
        processing_class=tiny_processor(),
        embedding_cache=embedding_cache,
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    assert trainer.is_fsdp_enabled == sharded
    losses = [entry["teacher_kl_loss"] for entry in trainer.state.log_history if "teacher_kl_loss" in entry]
    figures = trainer.evaluate() | {"teacher_kl_loss": losses[-1]}
    if lora_r:
        trainer.merge_adapter()
    trainer.save_model()
    return {name: value for name, value in figures.items() if "runtime" not in name and "second" not in name}


def run_sharded(folder: Path, lora_r: int):
    whole = run(folder / "whole", processes=2, lora_r=lora_r)
    resumed = run(folder / "resumed", processes=2, lora_r=lora_r, resume=folder / "whole" / "checkpoint-2")
    if lora_r:
        with pytest.raises(ValueError, match="LoRA with FSDP2 needs separate input and output embeddings"):
            run(folder / "tied", processes=2, lora_r=lora_r, tied=True)
        with pytest.raises(ValueError, match="FSDP2 needs one precision for all weights, but frozen_dtype"):
            run(folder / "frozen", processes=2, lora_r=lora_r, frozen_dtype=torch.bfloat16)
    if PartialState().is_main_process:
        (folder / "figures.json").write_text(json.dumps([whole, resumed]))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_launch_configuration_is_one_that_accelerate_knows(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == 8 and config.mixed_precision == "bf16"
    assert bool(config.fsdp_config) == (path.stem == "fsdp2")
    assert config.deepspeed_config.get("zero_stage") == {"zero2": 2, "zero3": 3}.get(path.stem)


@pytest.mark.slow
@pytest.mark.parametrize("lora_r", [0, 2], ids=["all_weights", "lora"])
def test_two_sharded_processes_train_save_and_resume_as_one_process(tmp_path, lora_r):
    config = yaml.safe_load((ROOT / "recipes" / "accelerate" / "fsdp2.yaml").read_text())
    (tmp_path / "fsdp2.yaml").write_text(yaml.safe_dump({**config, "num_processes": 2, "mixed_precision": "no"}))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "fsdp2.yaml")]
    sharded = subprocess.run(
        [*launcher, "-m", "tests.training.test_sharded_training", str(tmp_path), str(lora_r)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert sharded.returncode == 0, sharded.stderr
    expected = run(tmp_path / "one", processes=1, lora_r=lora_r)
    figures, resumed = json.loads((tmp_path / "figures.json").read_text())
    assert figures == pytest.approx(expected, rel=1e-3, abs=1e-4) and resumed == pytest.approx(figures)
    assert figures["teacher_kl_loss"] > 1e-4

    one, whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "whole", "resumed"))
    assert one.keys() == whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    start = tiny_model().state_dict()
    assert any((one[name] - start[name]).abs().max() > 1e-3 for name in one)
    for name in one:
        assert_close(whole[name], one[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    loaded = AutoModel.from_pretrained(tmp_path / "whole", trust_remote_code=True)
    assert all(torch.equal(loaded.get_parameter(name), whole[name]) for name in whole)


if __name__ == "__main__":
    run_sharded(Path(sys.argv[1]), lora_r=int(sys.argv[2]))
