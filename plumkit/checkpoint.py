"""
Loading of checkpoints, once it is known that a folder holds one that is safe and sensible to load. That is found out
from its small files and the headers of its weights: nothing of it is executed, and no memory is spent on its tensors.
"""

import json
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from configuration_plum import PlumConfig
from modeling_plum import PlumForConditionalGeneration
from processing_plum import PlumProcessor

# A checkpoint is read by the code of this folder, so nobody is asked whether to trust the copy saved with it.
AutoConfig.register("plum", PlumConfig, exist_ok=True)

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
JSON_BYTES_LIMIT = 32 * 1024**2
# A quantised checkpoint holds up to two parameters in a byte, stored as elements of up to four bytes.
PARAMETERS_PER_QUANTISED_ELEMENT = 8


def load_checkpoint(
    name: str | Path, changes: dict | None = None, *, dtype: str | torch.dtype = "auto"
) -> tuple[PlumForConditionalGeneration, PlumProcessor]:
    """
    A checkpoint, in evaluation mode, and its processor; `name_or_path` of the model is the folder it was read from.

    Args:
        name: A folder, or a name on the Hub.
        changes: Fields of its config to overwrite.
        dtype: Precision of all weights; `"auto"` takes that of the checkpoint.

    Raises:
        ValueError: As [`open_checkpoint`]; a change of an unknown field; a processor of another model.
    """
    folder = open_checkpoint(name)
    config = PlumConfig.from_pretrained(folder, **(changes or {}))
    check_config_fields(changes or {}, config)
    model = PlumForConditionalGeneration.from_pretrained(folder, config=config, use_safetensors=True, dtype=dtype)
    processor = PlumProcessor.from_pretrained(folder)
    expected, found = config.vlm_config.image_token_id, processor.image_token_id
    if found != expected:
        raise ValueError(
            f"{folder}: the processor's image token {processor.image_token!r} has id {found}, the model expects "
            f"{expected}; save the processor that the model was trained with."
        )
    return model, processor


def check_config_fields(given: dict, config: PreTrainedConfig, where: str = "model_config"):
    """`ValueError` on a field that `config` does not have: transformers would keep it and never read it."""
    known = {*type(config)().to_dict(), *config.attribute_map}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"{where} has fields {unknown}, which {type(config).__name__} does not know.")
    for name, value in given.items():
        if isinstance(getattr(config, name), PreTrainedConfig):
            check_config_fields(value, getattr(config, name), f"{where}.{name}")


def open_checkpoint(name: str | Path) -> Path:
    """
    The folder of a checkpoint that [`check_checkpoint`] lets pass, without its pickles if it comes from the Hub.

    Args:
        name: A folder, or a name on the Hub.

    Raises:
        ValueError: One sentence that names the file, or says that there is no such checkpoint.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(name), ignore_patterns=[f"*{suffix}" for suffix in PICKLES]))
        except (ValueError, OSError) as error:
            raise ValueError(
                f"The model {str(name)!r} is neither a folder nor to be had from the Hub: {error}"
            ) from error
    check_checkpoint(folder)
    return folder


def check_checkpoint(folder: str | Path) -> None:
    """
    Refuses a folder whose weights are pickled, lie outside of it, are damaged, or hold less than its config asks for.

    Raises:
        ValueError: One sentence that names the file.
    """
    folder = Path(folder)
    settings = _read_json(folder / "config.json")
    if settings.get("model_type") != "plum":
        raise ValueError(f"{folder} holds a {settings.get('model_type')!r} model, expected 'plum'.")
    tensors, elements = count_stored(weight_files(folder))
    _check_depths(settings, tensors, folder)
    if "quantization_config" in settings:
        elements *= PARAMETERS_PER_QUANTISED_ELEMENT
    needed = _count_parameters(folder)
    if needed > elements:
        raise ValueError(f"{folder / 'config.json'} asks for {needed:,} parameters, the weights hold {elements:,}.")


def _read_json(path: Path) -> dict:
    try:
        if path.stat().st_size > JSON_BYTES_LIMIT:
            raise ValueError(f"it is larger than {JSON_BYTES_LIMIT:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, found a {type(content).__name__}.")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder: bare names inside it, whatever its index says."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        found = f"found {pickles}, which are pickles and may run code" if pickles else "found neither"
        raise ValueError(f"{folder} needs {SINGLE_FILE} or {INDEX_FILE}, {found}.")
    weight_map = _read_json(folder / INDEX_FILE).get("weight_map")
    names = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
    if not names:
        raise ValueError(f"{folder / INDEX_FILE} has no weight_map of tensor names to file names.")
    for name in sorted(names):
        if not re.fullmatch(r"[\w.-]+\.safetensors", name) or not (folder / name).is_file():
            raise ValueError(f"{folder / INDEX_FILE} names {name!r}, which is no safetensors file of this folder.")
    return sorted(folder / name for name in names)


def count_stored(files: list[Path]) -> tuple[int, int]:
    """Tensors and elements of safetensors, by their headers."""
    tensors = elements = 0
    for path in files:
        try:
            with safe_open(path, framework="pt") as weights:
                for name in weights.keys():
                    elements += torch.Size(weights.get_slice(name).get_shape()).numel()
                    tensors += 1
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    return tensors, elements


def _check_depths(settings: dict, tensors: int, folder: Path) -> None:
    """No part of a model has more layers than the checkpoint has tensors; building it would not end."""
    for name, value in settings.items():
        if isinstance(value, dict):
            _check_depths(value, tensors, folder)
        elif ("layers" in name or "depth" in name) and isinstance(value, int) and value > tensors:
            raise ValueError(f"{folder / 'config.json'} has {name} = {value}, but the weights are {tensors} tensors.")


def _count_parameters(folder: Path) -> int:
    try:
        with torch.device("meta"):
            model = PlumForConditionalGeneration(PlumConfig.from_pretrained(folder))
    except (RuntimeError, TypeError, OverflowError, AttributeError, KeyError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no model that can be built: {error}") from error
    return sum(parameter.numel() for parameter in model.parameters())
