"""
Check that a folder contains a checkpoint that is safe to load, then load it.

    small files, headers of weights ──check_checkpoint──> executes nothing, allocates no memory for tensors
    tensors, tokenizer, processor   ──load_checkpoint───> all tensors of the model come from the files

Code, adapters and pickles of a checkpoint are never used. The code of this repository reads it.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.generation import GenerationMode

from configuration_plum import PlumConfig
from generation_plum import check_numbers
from inputs_plum import side_for_sam
from modeling_plum import PlumForConditionalGeneration
from plum_partonomy.inference.inputs import ModelError
from plum_partonomy.masks import DataError
from processing_plum import PlumProcessor

# The code of this folder reads the checkpoint, so no prompt asks whether to trust the copy saved with it.
AutoConfig.register("plum", PlumConfig, exist_ok=True)

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
GENERATION_FILE = "generation_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
JSON_BYTES_LIMIT = 64 * 1024**2
"""Maximum size of tokenizer files and of the index of weights."""
SETTINGS_BYTES_LIMIT = 2 * 1024**2
SETTINGS_DEPTH_LIMIT = 32
LARGEST_SIZE = 10**6
"""Maximum of a count or size in config.json; vocabularies are the largest."""
LONGEST = {"num_labels": 1000, "num_image_tokens": LARGEST_SIZE}
"""Maxima of the numbers, in any settings, of which a dictionary or a text of this length is made."""
UNCOUNTED = re.compile("position|length|theta|pixels")
"""Names of numbers in config.json that determine no tensor size."""
# A quantised checkpoint stores up to two parameters per byte, in elements of up to four bytes.
PARAMETERS_PER_QUANTISED_ELEMENT = 8
# Parameters with several names are stored once; layers have modules without parameters.
REGISTERED_PER_TENSOR = {"parameters": 2, "modules": 20}
OWN_CODE = re.compile(r"(configuration|modeling|processing)_plum\.Plum\w+")
BACKBONES = ("vlm.", "sam.")
LOCAL_DECODING = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)
"""Generation methods with code in transformers; the others load code from the Hub."""


def load_checkpoint(
    name: str | Path, changes: dict | None = None, *, dtype: str | torch.dtype = "auto"
) -> tuple[PlumForConditionalGeneration, PlumProcessor]:
    """
    Return a checkpoint in evaluation mode and its processor; `name_or_path` of the model is its folder.

    Args:
        name: A folder, or a name on the Hub.
        changes: Fields of its config to overwrite. Fields of a nested config overwrite those of the same family.
        dtype: Precision of all weights; `"auto"` uses that of the checkpoint.

    Raises:
        ModelError: As [`check_checkpoint`]; or there is no such checkpoint, tensors are missing or have other shapes,
            or the processor belongs to another model.
        DataError: A changed field is unknown, or changes the shapes of tensors.
    """
    folder = _find_folder(name)
    saved = check_checkpoint(folder).state_dict()
    with problems_named(f"{folder / 'config.json'} cannot be used"):
        config = PlumConfig.from_pretrained(folder)
    if changes:
        with problems_named("model_config cannot be used"):
            config = PlumConfig.from_dict(_overwrite(config, changes))
        check_config_fields(changes, config)
        _check_changes(folder, saved, config)
    with problems_named(f"{folder} cannot be loaded"):
        model, report = PlumForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            dtype=dtype,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are reported, and an error below
            output_loading_info=True,
        )
    _check_report(folder, report, saved, changes)
    if dtype != "auto" and getattr(config, "quantization_config", None):
        # transformers leaves many tensors of a quantised checkpoint in the precision in which they were saved.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    return model, _load_processor(folder, config)


def _overwrite(config: PreTrainedConfig, changes: dict) -> dict:
    """Return the fields of a config with changes, in nested configs as well; one of another family is replaced."""
    fields = config.to_dict()
    for name, value in changes.items():
        name = config.attribute_map.get(name, name)
        nested = getattr(config, name, None)
        if isinstance(nested, PreTrainedConfig) and isinstance(value, dict):
            family = value.get("model_type", nested.model_type)
            value = _overwrite(nested, value) if family == nested.model_type else value
        fields[name] = value
    return fields


def _check_changes(folder: Path, saved: dict[str, torch.Tensor], config: PlumConfig) -> None:
    """Raise `DataError` if a changed config gives the saved tensors other shapes, or other backbones."""
    changed = _build_outline(folder, config).state_dict()
    found, expected = ({name: tuple(item.shape) for name, item in tensors.items()} for tensors in (saved, changed))
    differing = [
        name
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
        and (name.startswith(BACKBONES) or name in found.keys() & expected.keys())
    ]
    if differing:
        here, there = (shapes.get(differing[0], "absent") for shapes in (expected, found))
        raise DataError(
            f"model_config does not fit the checkpoint {folder}: {len(differing)} tensors differ, such as "
            f"{differing[0]!r}, which is {here} by model_config and {there} in the checkpoint; leave model_config out "
            "or those of its fields that set sizes of the model."
        )


def _check_report(folder: Path, report: dict, saved: dict[str, torch.Tensor], changes: dict | None) -> None:
    """Raise `ModelError` if a checkpoint lacks tensors of its model, or has others or in other shapes."""
    absent = set(report["missing_keys"])
    if changes and absent:  # modules added by a change are initialised
        absent &= saved.keys()
    again = "leave model_config out" if changes else "fetch or save the checkpoint again"
    if absent:
        raise ModelError(
            f"The weights of {folder} lack {len(absent)} tensors of the model, such as {min(absent)!r}; {again}."
        )
    if report["unexpected_keys"] and not changes:  # a change may remove modules
        surplus = sorted(report["unexpected_keys"])
        raise ModelError(
            f"The weights of {folder} have {len(surplus)} tensors that are not in the model of its config, such as "
            f"{surplus[0]!r}; {again}."
        )
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"The weights of {folder} have {name!r} in shape {tuple(found)}, its config needs {tuple(expected)}; "
            f"{again}."
        )


def load_processor(name: str | Path) -> PlumProcessor:
    """Return the processor of a checkpoint without its model; errors as in [`load_checkpoint`]."""
    folder = _find_folder(name)
    check_checkpoint(folder)
    with problems_named(f"{folder / 'config.json'} cannot be used"):
        config = PlumConfig.from_pretrained(folder)
    return _load_processor(folder, config)


def _load_processor(folder: Path, config: PlumConfig) -> PlumProcessor:
    with problems_named(f"The processor of {folder} cannot be loaded"):
        processor = PlumProcessor.from_pretrained(folder, trust_remote_code=False)
        found, side = processor.image_token_id, side_for_sam(processor.sam_image_processor)
    expected = config.vlm_config.image_token_id
    last, rows = max(processor.tokenizer.get_vocab().values()), config.get_text_config().vocab_size
    if last >= rows:
        raise ModelError(
            f"{folder}: the tokenizer has tokens up to the id {last}, the model has embeddings of {rows} tokens; save "
            "the processor that the model was trained with."
        )
    if processor.vlm_image_input != config.vlm_image_input:
        raise ModelError(
            f"{folder}: the processor has vlm_image_input {processor.vlm_image_input!r}, the model expects "
            f"{config.vlm_image_input!r}; save the processor that the model was trained with."
        )
    if found != expected:
        raise ModelError(
            f"{folder}: the processor's image token {processor.image_token!r} has id {found}, the model expects "
            f"{expected}; save the processor that the model was trained with."
        )
    if side != config.sam_image_size:
        raise ModelError(
            f"{folder}: the processor makes images of {side} x {side} for SAM, the model expects "
            f"{config.sam_image_size} x {config.sam_image_size}; save the processor that the model was trained with."
        )
    return processor


@contextmanager
def problems_named(beginning: str) -> Iterator[None]:
    """Convert any exception of a library about an unsuitable file to a [`ModelError`] with this beginning."""
    try:
        yield
    except (ModelError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of tokenizers is not an Exception
        reason = " ".join(str(error).split())[:300] or "no reason given"
        raise ModelError(f"{beginning}: {reason} ({type(error).__name__}).") from error


def check_config_fields(given: dict, config: PreTrainedConfig, where: str = "model_config"):
    """Raise `DataError` for a field that `config` does not have, which transformers would store and ignore."""
    known = {*type(config)().to_dict(), *config.attribute_map}
    unknown = sorted(set(given) - known)
    if unknown:
        raise DataError(f"{where} has fields {unknown}, which {type(config).__name__} does not have.")
    for name, value in given.items():
        if isinstance(getattr(config, name), PreTrainedConfig):
            check_config_fields(value, getattr(config, name), f"{where}.{name}")


def with_floats(given: dict, config: PreTrainedConfig) -> dict:
    """Return the fields with 3.0 instead of 3 where `config` has a float, because its classes reject integers."""
    fields = {}
    for name, value in given.items():
        default = getattr(config, name, None)
        if isinstance(default, PreTrainedConfig) and isinstance(value, dict):
            family = value.get("model_type", default.model_type)
            known = CONFIG_MAPPING[family]() if family != default.model_type and family in CONFIG_MAPPING else default
            value = with_floats(value, known)
        elif isinstance(default, float) and type(value) is int:
            value = float(value)
        fields[name] = value
    return fields


def _find_folder(name: str | Path) -> Path:
    """Return the folder of a checkpoint, given as a folder or a name on the Hub; its pickles are not downloaded."""
    folder = Path(name)
    if not folder.is_dir():
        with problems_named(f"The model {str(name)!r} is not a local folder and was not found on the Hub"):
            folder = Path(snapshot_download(str(name), ignore_patterns=[f"*{suffix}" for suffix in PICKLES]))
    return folder


def check_checkpoint(folder: str | Path) -> PlumForConditionalGeneration:
    """
    Return the model of a folder without memory for its weights. Raise an error for a folder whose weights are pickled,
    outside of it, damaged, or fewer than its config needs; with an adapter; or with settings that name code or files
    from elsewhere.

    Raises:
        ModelError: One sentence that names the file.
    """
    folder = Path(folder)
    for path in sorted(folder.glob("adapter_*")):  # a checkpoint of a training with LoRA has no config.json
        raise ModelError(
            f"{path} belongs to an adapter, which is not used here: merge it into the weights first, as train.py does "
            "at the end of a training."
        )
    settings = _read_json(folder / "config.json", SETTINGS_BYTES_LIMIT)
    if settings.get("model_type") != "plum":
        raise ModelError(f"{folder} contains a {settings.get('model_type')!r} model, expected 'plum'.")
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith("config.json"):
            _check_settings(path, _read_json(path, SETTINGS_BYTES_LIMIT))
        elif path.stat().st_size > JSON_BYTES_LIMIT:
            raise ModelError(f"{path} is larger than {JSON_BYTES_LIMIT:,} bytes.")
    _check_sizes(folder / "config.json", settings)
    if (folder / GENERATION_FILE).exists():
        _check_generation(folder / GENERATION_FILE)
    tensors, elements = count_stored(weight_files(folder))
    if "quantization_config" in settings:
        elements *= PARAMETERS_PER_QUANTISED_ELEMENT
    with _bounded(tensors, folder / "config.json"):
        outline = _build_outline(folder)
    needed = sum(parameter.numel() for parameter in outline.parameters())
    if needed > elements:
        raise ModelError(
            f"{folder / 'config.json'} needs {needed:,} parameters, but the weights contain {elements:,}."
        )
    return outline


def _read_json(path: Path, bytes_limit: int) -> dict:
    try:
        if not path.is_file():
            raise ValueError("there is no such file; give a folder that save_pretrained has written")
        if path.stat().st_size > bytes_limit:
            raise ValueError(f"it is larger than {bytes_limit:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, found a {type(content).__name__}.")
    return content


def _walk(content: Any, depth: int = 0) -> Iterator[tuple[int, str, Any]]:
    """Yield depth, name and value of all settings, the outermost first."""
    if depth > SETTINGS_DEPTH_LIMIT:
        yield depth, "", None
        return
    pairs = content.items() if isinstance(content, dict) else (("", item) for item in content)
    for name, value in pairs:
        yield depth, name, value
        if isinstance(value, dict | list):
            yield from ((deep, key or name, inner) for deep, key, inner in _walk(value, depth + 1))


def _check_settings(path: Path, settings: dict) -> None:
    """
    Raise ModelError for settings that would make transformers import code, load weights from elsewhere or fill memory.
    """
    for depth, name, value in _walk(settings):
        if depth > SETTINGS_DEPTH_LIMIT:
            raise ModelError(f"{path} is nested more than {SETTINGS_DEPTH_LIMIT} levels deep.")
        if name in LONGEST and isinstance(value, int) and value > LONGEST[name]:
            raise ModelError(f"{path} has {name} = {value}, more than {LONGEST[name]:,}.")
        foreign = (
            (name == "auto_map" and not _is_own_code(value))
            or (name.endswith("_implementation") and isinstance(value, str) and "/" in value)
            or (name in ("audio_tokenizer", "use_pretrained_backbone", "custom_generate") and bool(value))
        )
        if foreign:
            raise ModelError(
                f"{path} has {name} = {json.dumps(value)[:100]}, code or weights from elsewhere, which are not used."
            )


def _is_own_code(auto_map: Any) -> bool:
    """Return whether `auto_map` names copies of this repository's code, which `config.json` has for other programs."""
    names = auto_map.values() if isinstance(auto_map, dict) else [None]
    return all(isinstance(name, str) and OWN_CODE.fullmatch(name.split("--")[-1]) for name in names)


def _check_sizes(path: Path, settings: dict) -> None:
    for _, name, value in _walk(settings):
        if isinstance(value, int) and abs(value) > LARGEST_SIZE and not UNCOUNTED.search(name):
            raise ModelError(f"{path} has {name} = {value}, more than {LARGEST_SIZE:,}.")


def _check_generation(path: Path) -> None:
    with problems_named(f"{path} cannot be used"):
        settings = _read_json(path, SETTINGS_BYTES_LIMIT)
        check_numbers(settings)
        mode = GenerationConfig.from_dict(settings).get_generation_mode()
    if mode not in LOCAL_DECODING:
        raise ModelError(f"{path} asks for {mode.value!r}, whose code is not part of transformers.")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, by bare names inside it."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        found = f"found {pickles}, which are pickles and may run code" if pickles else "found neither"
        raise ModelError(f"{folder} needs {SINGLE_FILE} or {INDEX_FILE}, {found}.")
    weight_map = _read_json(folder / INDEX_FILE, JSON_BYTES_LIMIT).get("weight_map")
    names = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
    if not names:
        raise ModelError(f"{folder / INDEX_FILE} has no weight_map of tensor names to file names.")
    for name in sorted(names):
        if not re.fullmatch(r"[\w.-]+\.safetensors", name) or not (folder / name).is_file():
            raise ModelError(f"{folder / INDEX_FILE} names {name!r}, which is not a safetensors file in this folder.")
    return sorted(folder / name for name in names)


def count_stored(files: list[Path]) -> tuple[int, int]:
    """Return the number of tensors and elements in safetensors files, from their headers."""
    tensors = elements = 0
    for path in files:
        try:
            with safe_open(path, framework="pt") as weights:
                for name in weights.keys():
                    elements += torch.Size(weights.get_slice(name).get_shape()).numel()
                    tensors += 1
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is not a complete safetensors file: {error}") from error
    return tensors, elements


def _build_outline(folder: Path, config: PlumConfig | None = None) -> PlumForConditionalGeneration:
    """Return the model of a folder, or of a changed config, without memory for its weights."""
    with problems_named(f"{folder / 'config.json'} describes no model that can be built"), torch.device("meta"):
        return PlumForConditionalGeneration(config or PlumConfig.from_pretrained(folder))


@contextmanager
def _bounded(tensors: int, path: Path) -> Iterator[None]:
    """Stop building a model, in this thread, that has many more layers than this number of tensors can fill."""
    thread, counts = threading.get_ident(), dict.fromkeys(REGISTERED_PER_TENSOR, 0)

    def count(kind: str) -> None:
        if threading.get_ident() != thread:
            return
        counts[kind] += 1
        if counts[kind] > 100 + tensors * REGISTERED_PER_TENSOR[kind]:
            raise ModelError(
                f"{path} asks for more {kind} than {counts[kind]:,}, but the weights are {tensors} tensors."
            )

    hooks = [
        register_module_parameter_registration_hook(lambda *_: count("parameters")),
        register_module_module_registration_hook(lambda *_: count("modules")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
