"""Image embeddings on disk: what a run computes with them and without, and what is left of a process that dies."""

import multiprocessing
import os
import resource
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from plum_partonomy.inference.embedding_cache import EmbeddingCache
from plum_partonomy.inference.predictor import Predictor
from plum_partonomy.masks import DataError, encode
from plum_partonomy.records import PartMask, Question
from plum_partonomy.scoring.benchmark import Asked
from plum_partonomy.training.examples import Collator, ConversationDataset
from plum_partonomy.training.options import PlumTrainingArguments
from plum_partonomy.training.trainer import PlumTrainer
from tests.runs import base_options, make_records, record, run_main
from tests.tiny import IMAGE_SIZE, random_image, random_mask, tiny_model, tiny_processor

IMAGES = 12


def pixels(count: int = IMAGES) -> torch.Tensor:
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


def rounded(model):
    """What a cached run is compared with: each image encoded alone, its embedding rounded."""
    encode_images, precision = type(model).get_image_embeddings, model.sam.vision_encoder.dtype

    @torch.no_grad()
    def embed(sam_pixel_values):
        rows = [encode_images(model, row[None])[0].bfloat16().to(precision) for row in sam_pixel_values]
        return torch.stack([row.contiguous() for row in rows])

    return embed


def count_encoded(model) -> list[int]:
    """Grows by one for every batch that the image encoder sees."""
    calls = []
    model.sam.vision_encoder.register_forward_hook(lambda module, args, output: calls.append(1))
    return calls


def entries(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


def start_filling(folder: Path, dies_at: int = 0) -> BaseProcess:
    """Another process that fills the cache; it is killed in the middle of that embedding, at 0 it is not."""
    process = multiprocessing.get_context("fork").Process(target=_fill, args=(folder, dies_at))
    process.start()
    return process


def _fill(folder: Path, dies_at: int) -> None:
    torch.set_num_threads(1)  # the threads of the process that was forked are not here
    written, write_through = [], os.fsync

    def die_in_the_middle(file: int) -> None:
        written.append(file)
        if len(written) == dies_at:
            os.ftruncate(file, 100)
            os.kill(os.getpid(), signal.SIGKILL)
        write_through(file)

    os.fsync = die_in_the_middle
    EmbeddingCache(folder, tiny_model()).embed(pixels())


# ------------------------------------------------------------------------------------------------ what is stored


def test_an_image_is_encoded_once_and_stored_as_the_rounded_embedding(tmp_path):
    model = tiny_model()
    expected, calls = rounded(model)(pixels()), count_encoded(model)
    cache = EmbeddingCache(tmp_path, model)
    repeated = torch.cat([pixels(3), pixels(2)])
    torch.testing.assert_close(cache.embed(repeated), torch.cat([expected[:3], expected[:2]]), rtol=0, atol=0)
    assert len(calls) == 3
    torch.testing.assert_close(EmbeddingCache(tmp_path, model).embed(pixels()), expected, rtol=0, atol=0)
    assert len(calls) == len(entries(tmp_path)) == IMAGES
    stored = [load_file(path)["embedding"] for path in tmp_path.rglob("*.safetensors")]
    assert {(item.dtype, item.shape) for item in stored} == {(torch.bfloat16, (32, 8, 8))}


def test_an_embedding_is_within_rounding_of_the_one_computed_without(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        exact = model.get_image_embeddings(pixels())
    torch.testing.assert_close(EmbeddingCache(tmp_path, model).embed(pixels()), exact, rtol=2**-8, atol=1e-6)


def test_other_weights_another_size_and_another_precision_have_entries_of_their_own(tmp_path):
    model = tiny_model()
    EmbeddingCache(tmp_path, model).embed(pixels(1))
    with torch.autocast("cpu", torch.bfloat16):
        EmbeddingCache(tmp_path, model).embed(pixels(1))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    with torch.no_grad():
        next(model.sam.mask_decoder.parameters()).add_(1)  # no part of the encoder
    EmbeddingCache(tmp_path, model).embed(pixels(1))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    with torch.no_grad():
        model.sam.vision_encoder.neck.conv1.weight[0, 0] += 1
    changed = EmbeddingCache(tmp_path, model).embed(pixels(1))
    torch.testing.assert_close(changed, rounded(model)(pixels(1)), rtol=0, atol=0)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    EmbeddingCache(tmp_path, tiny_model().bfloat16()).embed(pixels(1).bfloat16())
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4


def test_what_a_run_needs_is_said_before_it_starts(tmp_path):
    cache = EmbeddingCache(tmp_path, tiny_model())
    cache.embed(pixels(2))
    text = cache.describe(2**20)
    assert "4096 bytes each, for at most 1048576 images, 4.00 GiB, in" in text and "which has 2 of them" in text
    assert "4096 bytes each, in" in cache.describe(None)


# ------------------------------------------------------------------------------------------------ runs


def frozen_run(output_dir: Path, *, cache: Path | None = None, round_embeddings: bool = False, bf16: bool = False):
    """Weights after three steps, and the metrics."""
    model = tiny_model()
    model.sam.vision_encoder.requires_grad_(False)
    if round_embeddings:
        model.get_image_embeddings = rounded(model)
    args = PlumTrainingArguments(
        str(output_dir), learning_rate=0.01, max_steps=3, per_device_train_batch_size=4, bf16=bf16, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, logging_steps=1,
    )  # fmt: skip
    trainer = PlumTrainer(
        model=model,
        args=args,
        train_dataset=ConversationDataset(make_records([record(n, n % 4, n != 4) for n in range(6)])),
        eval_dataset=ConversationDataset(make_records([record(n, n % 4) for n in range(30, 33)])),
        data_collator=Collator(tiny_processor()),
        embedding_cache=cache and EmbeddingCache(cache, model),
    )
    trainer.train()
    metrics = {name: value for name, value in trainer.evaluate().items() if name.endswith(("giou", "loss"))}
    return model.state_dict(), metrics


@pytest.mark.parametrize("bf16", [False, True])
def test_training_with_a_cache_is_training_with_rounded_embeddings_filled_or_not(tmp_path, bf16):
    expected = frozen_run(tmp_path / "run", round_embeddings=True, bf16=bf16)
    for cache in ("the first run fills it", "the second finds it filled"):
        found = frozen_run(tmp_path / "run", cache=tmp_path / "cache", bf16=bf16)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=lambda text, cache=cache: f"{cache}: {text}")
    assert len(entries(tmp_path / "cache")) == 8  # one of nine records has no image


def test_evaluation_with_a_cache_is_evaluation_with_rounded_embeddings(tmp_path):
    images = [random_image(50, 70, seed=1), random_image(90, 40, seed=2)]
    questions = [
        Question(
            id=f"{index}",
            image=None,
            image_id=f"{index}",
            image_label="bird",
            question_type="identification",
            question="Which parts can you see?",
            choices=["left wing, and tail", "wheel"],
            correct=0,
            choice_parts=[["left wing", "tail"], ["wheel"]],
            masks=[PartMask(part, encode(random_mask(image.height, image.width))) for part in ("left wing", "tail")],
        )
        for index, image in enumerate(images)
    ]
    options = {"max_new_tokens": 4, "choice_reduction": "answer_mean", "mask_source": "gt_answer"}
    model, processor = tiny_model(), tiny_processor()
    cached = Predictor(model, processor, **options, embedding_cache=EmbeddingCache(tmp_path, model))
    asked = [Asked(each, image, each.image_id) for each, image in zip(questions, images, strict=True)]
    found = [cached.predict(asked) for _ in range(2)]
    assert len(entries(tmp_path)) == 2
    model.get_image_embeddings = rounded(model)
    with torch.no_grad():
        assert found == [Predictor(model, processor, **options).predict(asked)] * 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def test_the_option_of_train_fills_the_folder_that_it_announced(checkpoint, data_folder, tmp_path, capsys):
    options = base_options(data_folder, tmp_path / "out") | {"model": checkpoint, "max_steps": 2, "color_jitter": 0}
    options |= {"frozen_modules": "sam.vision_encoder", "cache_image_embeddings": tmp_path / "cache"}
    run_main(options)
    assert "image embeddings: 4096 bytes each, for at most 24 images" in capsys.readouterr().out
    assert 0 < len(entries(tmp_path / "cache")) <= 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"color_jitter": 0}, "a frozen image encoder; add sam.vision_encoder to frozen_modules"),
        (
            {"frozen_modules": "sam.vision_encoder"},
            "unchanged images; set color_jitter, random_crop and random_affine to 0, found 0.2, 0.0, 0.0",
        ),
        (
            {"frozen_modules": "sam.vision_encoder", "color_jitter": 0, "random_crop": 0.1},
            "random_affine to 0, found 0.0, 0.1, 0.0",
        ),
    ],
)
def test_a_run_whose_embeddings_change_is_refused(checkpoint, data_folder, tmp_path, changes, message):
    options = base_options(data_folder, tmp_path / "out") | {"cache_image_embeddings": tmp_path / "cache"}
    with pytest.raises(ValueError, match=message):
        run_main(options | {"model": checkpoint} | changes)
    assert not (tmp_path / "cache").exists()


# ------------------------------------------------------------------------------------------------ accidents


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    EmbeddingCache(folder, tiny_model()).embed(pixels())
    return entries(folder)


def test_a_process_that_is_killed_while_it_writes_leaves_whole_entries_and_the_next_one_does_the_rest(tmp_path, whole):
    killed = start_filling(tmp_path, dies_at=5)
    killed.join(timeout=120)
    assert killed.exitcode == -signal.SIGKILL
    left = entries(tmp_path)
    assert len(left) == 4 and left.items() <= whole.items()
    assert [path.stat().st_size for path in tmp_path.rglob("writing.partial")] == [100]
    model = tiny_model()
    calls = count_encoded(model)
    EmbeddingCache(tmp_path, model).embed(pixels())
    assert len(calls) == IMAGES - 4
    assert entries(tmp_path) == whole and not list(tmp_path.rglob("writing.partial"))


def test_processes_that_fill_one_folder_at_a_time_leave_what_one_process_leaves(tmp_path, whole):
    cache, other = EmbeddingCache(tmp_path, tiny_model()), start_filling(tmp_path)
    cache.embed(pixels())
    other.join(timeout=120)
    assert other.exitcode == 0
    assert entries(tmp_path) == whole


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_damaged_entry_is_made_again(tmp_path, whole, length):
    cache = EmbeddingCache(tmp_path, tiny_model())
    cache.embed(pixels())
    path = next(iter(tmp_path.rglob("*.safetensors")))
    path.write_bytes(path.read_bytes()[:length])
    torch.testing.assert_close(cache.embed(pixels()), rounded(tiny_model())(pixels()), rtol=0, atol=0)
    assert entries(tmp_path) == whole


@pytest.mark.parametrize("place", [-1, -300, 30])
def test_an_entry_with_a_flipped_bit_is_made_again(tmp_path, whole, place):
    cache = EmbeddingCache(tmp_path, tiny_model())
    cache.embed(pixels())
    path = next(iter(tmp_path.rglob("*.safetensors")))
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    torch.testing.assert_close(cache.embed(pixels()), rounded(tiny_model())(pixels()), rtol=0, atol=0)
    assert entries(tmp_path) == whole


def test_a_full_disk_is_one_error_that_leaves_no_partial_entry(tmp_path, whole):
    """The limit on the size of a file makes the system refuse to write on, as on a disk without room."""
    cache = EmbeddingCache(tmp_path, tiny_model())
    cache.embed(pixels(2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DataError, match="cannot be written to .*; make room and start again"):
            cache.embed(pixels())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(entries(tmp_path)) == 2 and not list(tmp_path.rglob("writing.partial"))
    cache.embed(pixels())
    assert entries(tmp_path) == whole


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="the folder .*/file/cache cannot be made"):
        EmbeddingCache(tmp_path / "file" / "cache", tiny_model())
