"""Convert a checkpoint of the authors' PLUM (github.com/AnselBlume/partonomy) to a folder that loads here, and back.

python scripts/convert_original_plum.py --checkpoint plum-13b --vision_tower clip-vit-large-patch14 \\
    --tokenizer plum-13b --center_crop --output_dir plum-13b-hf
python scripts/convert_original_plum.py --reverse --checkpoint plum-13b-hf --output_dir plum-13b-original

The folder `--checkpoint` contains `pytorch_model*.bin` or `*.safetensors`, single or sharded, with merged LoRA or with
separate LoRA tensors (then pass `--lora_alpha` and `--lora_r`). Sizes are read from the tensors. Options that shapes
do not determine (attention heads, norms, rotary base) come from its config.json or from `--config`, a JSON object with
the keys `llm`, `clip`, `sam` and `plum`. Merged checkpoints do not contain the CLIP tower: pass its transformers
folder as `--vision_tower`.

Each tensor has a source and a destination in `original_plum.py`; missing or unused tensors raise an error that lists
them. The whole plan is checked on shapes before any data is read. Then tensors are read from memory-mapped files and
written shard by shard to a temporary folder, which is renamed at the end.

Two tensors have no counterpart in the original. The image placeholder is a token here, so embeddings and head get one
more row of zeros: the embedding row is never looked up, the placeholder's logit is always 0 (which adds exp(0) to a
softmax over the vocabulary) and generation suppresses it. A projector with one linear layer is followed by the
identity here, which is exact.
"""

import argparse
import json
import pickle
import re
import resource
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPVisionConfig

from backbones_plum import image_processor_class
from configuration_plum import PlumConfig
from modeling_plum import PlumForConditionalGeneration
from plum_partonomy.hub import original_plum as original
from processing_plum import PlumProcessor

PROJECTOR = "vlm.model.multi_modal_projector."
WITH_PLACEHOLDER = ("vlm.lm_head.weight", "vlm.model.language_model.embed_tokens.weight")
MIN_SHARD_BYTES = 50_000_000
FEEDBACK_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Recipe:
    """How a tensor is made: its source tensors and, unless it is a copy, a function of them."""

    sources: tuple[str, ...]
    build: Callable[..., torch.Tensor] = lambda tensor: tensor


Plan = dict[str, Recipe]


class CheckpointReader:
    """
    The tensors of a folder's weight files, read one by one from memory-mapped files.

    Args:
        folder: Contains `*.safetensors` or `pytorch_model*.bin`, listed by an index file if there is one.

    Raises:
        ValueError: There are no weights, a file of the index is missing, a name occurs twice, or a file contains more
            than tensors.
    """

    def __init__(self, folder: Path):
        self.shapes: dict[str, torch.Tensor] = {}  # on the meta device
        self._files: dict[str, tuple[Path, str]] = {}
        self._open: dict[Path, Callable[[str], torch.Tensor]] = {}
        self.add(folder)

    def add(self, folder: Path, prefix: str = "", beginning: str = ""):
        """Add the tensors of a folder whose names start with `beginning`, under names with a prefix."""
        for path in self._weight_files(folder):
            names, read = self._load(path)
            for name in (name for name in names if name.startswith(beginning)):
                if prefix + name in self._files:
                    first = self._files[prefix + name][0]
                    raise ValueError(f"{path} and {first} both contain the tensor {name!r}; remove one.")
                self._files[prefix + name] = (path, name)
                self.shapes[prefix + name] = read(name).to("meta")

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.shapes.values())

    @staticmethod
    def _weight_files(folder: Path) -> list[Path]:
        indexes = [*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")]
        if indexes:
            names = set(original.read_json(indexes[0]).get("weight_map", {}).values())
            paths = sorted(folder / Path(name).name for name in names)
            if missing := [path.name for path in paths if not path.is_file()]:
                raise ValueError(f"{indexes[0]} names the files {missing}, which are not in {folder}.")
            return paths
        paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
        if not paths:
            raise ValueError(
                f"{folder} has neither *.safetensors nor pytorch_model*.bin; give the checkpoint's folder."
            )
        return paths

    @staticmethod
    def _load(path: Path) -> tuple[list[str], Callable[[str], torch.Tensor]]:
        """Return the names of a file's tensors and a function that reads one."""
        try:
            if path.suffix == ".safetensors":
                file = safe_open(path, framework="pt")
                return list(file.keys()), file.get_tensor
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{path} is not a plain file of tensors; a pickle that would run code is not loaded, and the format "
                f"of PyTorch before 1.6 cannot be memory-mapped: {str(error).splitlines()[0]}"
            ) from error
        if not isinstance(tensors, dict):
            raise ValueError(f"{path} contains a {type(tensors).__name__}, expected tensors by name.")
        for name, value in tensors.items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"{path} contains {name!r}, a {type(value).__name__}, expected a tensor.")
        return list(tensors), tensors.__getitem__

    def read(self, name: str) -> torch.Tensor:
        path, name_in_file = self._files[name]
        if path not in self._open:
            self._open[path] = self._load(path)[1]
        return self._open[path](name_in_file)

    def release(self):
        """Unmap the files, so that their pages no longer count as memory of this process."""
        self._open.clear()


# ------------------------------------------------------------------------------------------- names of one checkpoint


class OriginalCheckpoint:
    """
    An original checkpoint under plain names: without peft's prefixes, with shared tensors once and LoRA merged, and
    without tensors that have no counterpart here (`unused` counts them by reason).

    Raises:
        ValueError: Two names for one tensor, shared tensors that differ, LoRA tensors that do not fit.
    """

    def __init__(self, reader: CheckpointReader, lora_alpha: float | None, lora_r: int | None):
        self.reader = reader
        self.unused: Counter[str] = Counter()
        plain: dict[str, str] = {}
        for name in reader.shapes:
            short = name.removeprefix("base_model.model.")
            short = short.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")
            reason = next((reason for pattern, reason in original.UNUSED.items() if re.search(pattern, short)), None)
            if reason is not None:
                self.unused[reason] += 1
            elif short in plain:
                raise ValueError(f"The tensors {plain[short]!r} and {name!r} are both {short!r}; remove one.")
            else:
                plain[short] = name
        adapters = {name: plain.pop(name) for name in [*plain] if re.search(r"\.lora_[AB]\.", name)}
        self._drop_shared(plain)
        recipes = {name: Recipe((source,)) for name, source in plain.items()}
        self.recipes = recipes | plan_lora(reader.shapes, recipes, adapters, lora_alpha, lora_r)
        self.shapes = original.Shapes({name: build(self.recipes[name], reader.shapes.get) for name in self.recipes})

    def _drop_shared(self, plain: dict[str, str]):
        for name in [*plain]:
            stored = original.rename(name, original.SHARED)
            if stored in plain:
                if not torch.equal(self.reader.read(plain[name]), self.reader.read(plain[stored])):
                    raise ValueError(
                        f"{name!r} and {stored!r} differ, but are one shared tensor in the original; keep the one "
                        "that was trained."
                    )
                del plain[name]
        self.release()

    def read(self, name: str) -> torch.Tensor:
        return build(self.recipes[name], self.reader.read)

    def release(self):
        self.reader.release()


def build(recipe: Recipe, get: Callable[[str], torch.Tensor]) -> torch.Tensor:
    return recipe.build(*(get(source) for source in recipe.sources))


def plan_lora(shapes, recipes: Plan, adapters: dict[str, str], alpha: float | None, rank: int | None) -> Plan:
    """Return recipes that add `B A alpha / r` (LoRA, arXiv 2106.09685, section 4.1) to the weights with adapters."""
    if adapters and (alpha is None or rank is None):
        raise ValueError(
            f"The checkpoint has {len(adapters)} LoRA tensors that are not merged, such as {min(adapters)!r}; give "
            "--lora_alpha and --lora_r as in its training."
        )
    merged = {}
    for name in sorted(adapters):
        down, up = name.replace(".lora_B.", ".lora_A."), name.replace(".lora_A.", ".lora_B.")
        weight = re.sub(r"\.lora_[AB]\..*", ".weight", name)
        if not {down, up} <= adapters.keys() or weight not in recipes:
            raise ValueError(f"The LoRA tensor {name!r} needs all of {down!r}, {up!r} and {weight!r} beside it.")
        sources = (recipes[weight].sources[0], adapters[down], adapters[up])
        base, found = shapes[sources[0]].shape, (tuple(shapes[sources[1]].shape), tuple(shapes[sources[2]].shape))
        if found != ((rank, base[1]), (base[0], rank)):
            raise ValueError(
                f"The LoRA tensors of {weight!r} are {found[0]} and {found[1]}, expected {(rank, base[1])} and "
                f"{(base[0], rank)} with --lora_r {rank}."
            )
        merged[weight] = Recipe(sources, partial(merge_lora, scale=alpha / rank))
    return merged


def merge_lora(base: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    return (base.float() + up.float() @ down.float() * scale).to(base.dtype)


# -------------------------------------------------------------------------------------------------------------- plans


def plan_conversion(config: PlumConfig, targets: Iterable[str]) -> Plan:
    """Return the recipe of each tensor here from the original ones."""
    pairs = [(here, there) for there, here in original.name_pairs(config)]
    plan = {}
    for name in targets:
        if found := re.fullmatch(r"mask_feedback\.([qkv]_proj)\.(weight|bias)", name):
            part = FEEDBACK_PROJECTIONS.index(found[1])
            plan[name] = Recipe(
                (f"mask_pooler.attn.in_proj_{found[2]}",), lambda fused, part=part: fused.chunk(3)[part].clone()
            )
        elif name in WITH_PLACEHOLDER:
            source = original.rename(name, pairs)
            plan[name] = Recipe((source,), lambda rows: torch.cat([rows, rows.new_zeros(1, rows.shape[1])]))
        elif name == "mask_feedback.queries":
            plan[name] = Recipe(("mask_pooler.queries",), lambda queries: queries.squeeze(1))
        elif name == PROJECTOR + "linear_2.weight" and config.vlm_config.projector_hidden_act == "linear":
            plan[name] = Recipe(("model.mm_projector.weight",), lambda weight: torch.eye(len(weight)).to(weight))
        elif name == PROJECTOR + "linear_2.bias" and config.vlm_config.projector_hidden_act == "linear":
            plan[name] = Recipe(("model.mm_projector.bias",), torch.zeros_like)
        else:
            plan[name] = Recipe((original.rename(name, pairs) or name,))
    return plan


def plan_reversal(config: PlumConfig, sources: Iterable[str]) -> Plan:
    """Return the recipe of each original tensor that exists here."""
    pairs = [(here, there) for there, here in original.name_pairs(config)]
    linear = config.vlm_config.projector_hidden_act == "linear"
    plan = {}
    for name in sources:
        if found := re.fullmatch(r"mask_feedback\.[qkv]_proj\.(weight|bias)", name):
            parts = tuple(f"mask_feedback.{part}.{found[1]}" for part in FEEDBACK_PROJECTIONS)
            plan[f"mask_pooler.attn.in_proj_{found[1]}"] = Recipe(parts, lambda *parts: torch.cat(parts))
        elif name in WITH_PLACEHOLDER:
            plan[original.rename(name, pairs)] = Recipe((name,), lambda rows: rows[:-1].clone())
        elif name == "mask_feedback.queries":
            plan["mask_pooler.queries"] = Recipe((name,), lambda queries: queries[:, None])
        elif linear and name.startswith(PROJECTOR):
            weights, biases = ([f"{PROJECTOR}linear_{i}.{kind}" for i in (1, 2)] for kind in ("weight", "bias"))
            plan["model.mm_projector.weight"] = Recipe(tuple(weights), lambda first, second: second @ first)
            plan["model.mm_projector.bias"] = Recipe(
                (biases[0], weights[1], biases[1]), lambda first, weight, second: weight @ first + second
            )
        elif (there := original.rename(name, pairs)) is not None:
            plan[there] = Recipe((name,))
    return plan


def check_complete(plan: Plan, sources: dict[str, torch.Tensor]):
    """Raise `ValueError` with the tensors that a plan needs but lacks, and those it does not use."""
    needed = {source for recipe in plan.values() for source in recipe.sources}
    missing, surplus = sorted(needed - sources.keys()), sorted(sources.keys() - needed)
    if missing or surplus:
        raise ValueError(
            f"The checkpoint lacks {len(missing)} tensors: {missing}; and has {len(surplus)} that are not known: "
            f"{surplus}. Nothing was written."
        )


# ------------------------------------------------------------------------------------------------------------ folders


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, renamed to it on success and removed on failure."""
    if path.exists():
        raise ValueError(f"{path} exists already; give another --output_dir or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
        folder = Path(temporary) / path.name
        folder.mkdir()
        yield folder
        folder.rename(path)


def write_weights(plan: Plan, source: CheckpointReader | OriginalCheckpoint, folder: Path):
    """Compute the tensors of a plan and write them, one shard of a tenth of the total at a time."""
    shapes = {name: build(recipe, source.shapes.get) for name, recipe in plan.items()}
    size = max(MIN_SHARD_BYTES, sum(tensor.nbytes for tensor in shapes.values()) // 10)
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=size)
    for filename, names in split.filename_to_tensors.items():
        tensors = {name: build(plan[name], source.read).contiguous() for name in names}
        save_file(tensors, folder / filename, metadata={"format": "pt"})
        del tensors
        source.release()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def make_processor(tokenizer_folder: Path, config: PlumConfig, center_crop: bool) -> PlumProcessor:
    """Return the original's preprocessing, with its crop of the language side's image only on request."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens([*original.IMAGE_MARKERS, original.IMAGE_TOKEN], special_tokens=True)
    image_token_id = config.vlm_config.image_token_id
    ids = tokenizer.convert_tokens_to_ids([*original.IMAGE_MARKERS, original.IMAGE_TOKEN])
    if ids != [image_token_id - 2, image_token_id - 1, image_token_id]:
        raise ValueError(
            f"The tokenizer of {tokenizer_folder} has {original.IMAGE_MARKERS} and {original.IMAGE_TOKEN!r} at {ids}, "
            f"expected the three ids up to {image_token_id}: the embeddings have {image_token_id} rows of the "
            "original; give the tokenizer that was trained with this checkpoint."
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    vision, sam = config.vlm_config.vision_config, config.sam_config.vision_config
    cells = (vision.image_size // vision.patch_size) ** 2
    return PlumProcessor(
        image_processor_class("LlavaImageProcessor")(
            size={"shortest_edge": vision.image_size}, crop_size=vision.image_size, do_pad=not center_crop
        ),
        image_processor_class("SamImageProcessor")(
            size={"longest_edge": sam.image_size}, pad_size={"height": sam.image_size, "width": sam.image_size}
        ),
        tokenizer,
        num_image_tokens=cells + (config.vlm_config.vision_feature_select_strategy == "full"),
        image_token=original.IMAGE_TOKEN,
        chat_template=original.CHAT_TEMPLATE,
    )


# --------------------------------------------------------------------------------------------------------- both ways


def convert(
    checkpoint: Path,
    output_dir: Path,
    *,
    config_file: Path | None = None,
    vision_tower: Path | None = None,
    tokenizer: Path | None = None,
    center_crop: bool = False,
    lora_alpha: float | None = None,
    lora_r: int | None = None,
):
    """
    Write an original checkpoint as a folder that `AutoModel.from_pretrained` loads; see the module docstring.

    Raises:
        ValueError: A tensor or option is missing, unused, mis-shaped or contradictory; nothing is written.
    """
    reader = CheckpointReader(checkpoint)
    tower = None
    if vision_tower is not None:
        if any(original.VISION_TOWER in name for name in reader.shapes):
            raise ValueError(f"{checkpoint} contains a vision tower; remove --vision_tower.")
        reader.add(vision_tower, prefix=original.VISION_TOWER, beginning="vision_model.")
        tower = CLIPVisionConfig.from_pretrained(vision_tower)
    source = OriginalCheckpoint(reader, lora_alpha, lora_r)
    for reason, count in source.unused.items():
        print(f"Left out {count} tensors: {reason}")
    config = original.read_config(source.shapes, original.read_options(checkpoint, config_file), tower)

    with torch.device("meta"):
        model = PlumForConditionalGeneration(config).to(source.shapes["model.embed_tokens.weight"].dtype)
    # The image placeholder is only an input; its row of the head is zero.
    model.generation_config.suppress_tokens = [config.vlm_config.image_token_id]
    targets = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    plan = plan_conversion(config, targets)
    check_complete(plan, source.shapes)
    check_shapes(plan, source.shapes, targets)
    processor = None if tokenizer is None else make_processor(tokenizer, config, center_crop)

    with new_folder(output_dir) as folder:
        model.save_pretrained(folder, state_dict={})  # configuration and code; the weights follow, shard by shard
        write_weights(plan, source, folder)
        if processor is not None:
            processor.save_pretrained(folder)


def check_shapes(plan: Plan, sources: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]):
    """Raise `ValueError` with the tensors whose shape would differ from the model's."""
    made = {name: tuple(build(recipe, sources.get).shape) for name, recipe in plan.items()}
    wrong = [
        f"{' + '.join(plan[name].sources)} gives {made[name]} for {name}, expected {tuple(targets[name].shape)}"
        for name in plan
        if made[name] != tuple(targets[name].shape)
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors have a wrong shape: {'; '.join(wrong)}. Nothing was written.")


def reverse(checkpoint: Path, output_dir: Path):
    """Write a converted folder under the original's names, with `options.json`, the `--config` to convert it back."""
    reader = CheckpointReader(checkpoint)
    config = PlumConfig.from_pretrained(checkpoint)
    if config.vlm_config.model_type != "llava" or config.vlm_image_input != "pixel_values":
        raise ValueError(
            f"The original is a llava that looks at pixels; {checkpoint} is a {config.vlm_config.model_type} that "
            f"looks at {config.vlm_image_input}."
        )
    rows = config.vlm_config.text_config.vocab_size
    if config.vlm_config.image_token_id != rows - 1:
        raise ValueError(
            "The original has the image placeholder outside its vocabulary, so it has to be the last token here: "
            f"image_token_index is {config.vlm_config.image_token_id}, expected {rows - 1}."
        )
    plan = plan_reversal(config, reader.shapes)
    check_complete(plan, reader.shapes)
    with new_folder(output_dir) as folder:
        write_weights(plan, reader, folder)
        (folder / "options.json").write_text(json.dumps(original.original_options(config), indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the weights")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write, which must not exist")
    parser.add_argument("--reverse", action="store_true", help="convert back to the original's names")
    parser.add_argument("--config", type=Path, help="JSON with the keys llm, clip, sam, plum; default: config.json")
    parser.add_argument("--vision_tower", type=Path, help="transformers CLIP folder, if the checkpoint has no tower")
    parser.add_argument("--tokenizer", type=Path, help="folder of its tokenizer; without it no processor is written")
    parser.add_argument("--center_crop", action="store_true", help="crop CLIP's image, as the original was trained")
    parser.add_argument("--lora_alpha", type=float, help="alpha of the training, if LoRA is not merged")
    parser.add_argument("--lora_r", type=int, help="rank of the training, if LoRA is not merged")
    options = vars(parser.parse_args())
    checkpoint, output_dir, config_file = (options.pop(name) for name in ("checkpoint", "output_dir", "config"))
    try:
        if options.pop("reverse"):
            reverse(checkpoint, output_dir)
        else:
            convert(checkpoint, output_dir, config_file=config_file, **options)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    size = CheckpointReader(checkpoint).num_bytes
    print(f"{output_dir}: peak memory {peak / 1e9:.2f} GB for a checkpoint of {size / 1e9:.2f} GB, {peak / size:.2f}x")


if __name__ == "__main__":
    main()
