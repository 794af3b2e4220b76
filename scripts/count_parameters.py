"""
Print the parameters of a recipe's model by module, all and those trained with LoRA; no weights are needed.

    python scripts/count_parameters.py recipes/stage1_plum_7b.yaml

Options of train.py override the recipe, for example `--vlm FOLDER --sam FOLDER` without access to the Hub: a folder
needs only a config.json.
"""

import sys
from collections import Counter

import torch
from transformers import AutoConfig

from configuration_plum import PlumConfig
from modeling_plum import PlumForConditionalGeneration
from plum_partonomy.training.model import add_lora
from plum_partonomy.training.options import parse_arguments


def module_of(name: str) -> str:
    """Return the module of PLUM that a parameter belongs to, with or without LoRA wrappers."""
    parts = [part for part in name.removeprefix("base_model.model.").split(".") if part != "model"]
    return ".".join(parts[:2]) if parts[0] in ("vlm", "sam") else parts[0]


def count_parameters(argv: list[str]) -> list[tuple[str, int, int]]:
    """Return rows (module, parameters, trained parameters) of a recipe with `vlm` and `sam`, the sum last."""
    arguments, _, _ = parse_arguments([*argv, "--use_cpu", "true"])
    backbones = [AutoConfig.from_pretrained(folder) for folder in (arguments.vlm, arguments.sam)]
    config = PlumConfig(vlm_config=backbones[0], sam_config=backbones[1], **(arguments.model_config or {}))
    with torch.device("meta"):
        model = PlumForConditionalGeneration(config)
        total, trained = Counter(), Counter()
        for name, parameter in model.named_parameters():
            total[module_of(name)] += parameter.numel()
        for name, parameter in add_lora(model, arguments).named_parameters():
            if parameter.requires_grad:
                trained[module_of(name)] += parameter.numel()
    rows = [(module, count, trained[module]) for module, count in total.items()]
    return [*rows, ("all", sum(total.values()), sum(trained.values()))]


def format_table(rows: list[tuple[str, int, int]]) -> str:
    lines = ["| module | parameters | trained with LoRA |", "|---|---:|---:|"]
    return "\n".join([*lines, *(f"| `{module}` | {count:,} | {trained:,} |" for module, count, trained in rows)])


if __name__ == "__main__":
    print(format_table(count_parameters(sys.argv[1:])))
