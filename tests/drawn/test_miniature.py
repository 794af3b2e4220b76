import io
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from plum_partonomy.drawn import miniature
from plum_partonomy.drawn.objects import OBJECTS, Part, Shape
from plum_partonomy.masks import area, decode
from plum_partonomy.seeding import seeded_generator

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def examples():
    return [miniature.draw_example("test", index) for index in range(240)]


@pytest.fixture(scope="module")
def instance_examples():
    return [miniature.draw_instances_example("test", index) for index in range(60)]


def test_there_are_twelve_kinds_of_object_in_four_families_and_many_shared_parts():
    graph = miniature.part_graph()
    labels = [label for members in miniature.instance_graph().values() for label in members]
    assert sorted(labels) == sorted(graph)
    assert len(graph) >= 12
    assert len(miniature.instance_graph()) == 4
    owners = Counter(part for parts in graph.values() for part in parts)
    assert len(owners) >= 40
    assert sum(count > 1 for count in owners.values()) >= 20


def test_every_kind_has_one_or_two_required_and_six_to_eight_optional_parts():
    required = miniature.required_parts()
    for label, parts in miniature.part_graph().items():
        assert parts == sorted(set(parts))
        assert 1 <= len(required[label]) <= 2
        assert 6 <= len(set(parts) - set(required[label])) <= 8


def test_a_drawing_depends_on_seed_split_and_index_alone():
    later = miniature.draw_example("train", 7)
    miniature.draw_example("train", 8)
    again = miniature.draw_example("train", 7)
    assert again.masks == later.masks
    np.testing.assert_array_equal(np.asarray(again.image), np.asarray(later.image))
    others = [
        miniature.draw_example("test", 7),
        miniature.draw_example("train", 19),
        miniature.draw_example("train", 7, seed=1),
    ]
    assert all(other.image_label == later.image_label for other in others)
    assert all(np.any(np.asarray(other.image) != np.asarray(later.image)) for other in others)


def test_another_process_with_another_hash_seed_draws_the_same():
    code = "from plum_partonomy.drawn.miniature import draw_example; print(draw_example('train', 3).masks)"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert outputs == {f"{miniature.draw_example('train', 3).masks}\n"}


def test_images_are_small_colour_pictures_of_the_right_kind(examples):
    for index, example in enumerate(examples):
        assert example.image.mode == "RGB"
        assert example.image.size == (miniature.MINI.image_size,) * 2
        assert example.image_label == list(OBJECTS)[index % len(OBJECTS)]
    assert len({example.image.tobytes() for example in examples}) == len(examples)


def test_required_parts_are_always_there_and_optional_ones_about_every_second_time(examples):
    graph, required = miniature.part_graph(), miniature.required_parts()
    present, possible = 0, 0
    for example in examples:
        labels = [mask.label for mask in example.masks]
        assert labels == sorted(set(labels))
        assert set(required[example.image_label]) <= set(labels) <= set(graph[example.image_label])
        present += len(labels) - len(required[example.image_label])
        possible += len(graph[example.image_label]) - len(required[example.image_label])
    assert present / possible == pytest.approx(0.5, abs=0.06)


def test_masks_are_disjoint_and_large_enough_to_be_seen(examples):
    for example in examples[:60]:
        size = (miniature.MINI.image_size,) * 2
        stack = np.stack([decode(mask.rle, expected_size=size) for mask in example.masks])
        assert stack.sum(axis=0).max() == 1
        assert stack.sum(axis=(1, 2)).min() >= miniature.MINI.min_visible_pixels


def test_a_mask_lies_on_its_part_by_colour():
    """Flags are red whatever the object: the mask of a flag must hold red pixels, its surroundings fewer."""
    redness = []
    for index in range(4, 240, 12):
        example = miniature.draw_example("train", index)
        for mask in example.masks:
            if mask.label == "flag":
                inside = decode(mask.rle)
                pixels = np.asarray(example.image, dtype=float)
                excess = pixels[..., 0] - pixels[..., 1:].mean(axis=-1)
                around = ndimage.binary_dilation(inside, iterations=6) & ~ndimage.binary_dilation(inside, iterations=2)
                redness.append(np.median(excess[inside]) - np.median(excess[around]))
    assert len(redness) >= 5
    assert min(redness) > 0


def test_instances_of_a_part_are_separate_masks_that_do_not_touch(instance_examples):
    for example in instance_examples:
        counts = Counter(mask.label for mask in example.masks)
        repeated = [label for label, count in counts.items() if count > 1]
        assert repeated
        for label in repeated:
            masks = [decode(mask.rle) for mask in example.masks if mask.label == label]
            assert 2 <= len(masks) <= 4
            grown = [ndimage.binary_dilation(mask, structure=np.ones((3, 3))) for mask in masks]
            for position, mask in enumerate(masks):
                assert mask.sum() >= miniature.MINI.min_visible_pixels
                assert not any((mask & other).any() for place, other in enumerate(grown) if place != position)


def test_a_hidden_part_is_left_out_rather_than_left_unannotated():
    """A part behind a larger one in every pose has no visible pixel, so it must not be among the masks."""
    front = next(part for part in OBJECTS["bus"] if part.name == "body")
    (left, top), *_ = front.instances[0][0].points
    sliver = Shape(((left + 0.5, top + 0.4), (left + 0.6, top + 0.4), (left + 0.6, top + 0.5)))
    drawing = miniature._draw("bus", [Part("hidden", ((sliver,),)), front], miniature.MINI, seeded_generator("test"))
    assert set(drawing.names) == {front.name}


def test_encoded_images_decode_to_the_same_picture_up_to_compression(examples):
    for example in examples[:5]:
        encoded = miniature.encode_image(example.image)
        decoded = np.asarray(Image.open(io.BytesIO(encoded["bytes"])), dtype=float)
        assert np.abs(decoded - np.asarray(example.image, dtype=float)).mean() < 6
        assert len(encoded["bytes"]) < 6000


def test_the_area_of_a_drawing_is_mostly_in_view(examples):
    shares = [sum(area(mask.rle) for mask in example.masks) / miniature.MINI.image_size**2 for example in examples]
    assert min(shares) > 0.04
    assert max(shares) < 0.7


# ------------------------------------------------------------------------------------------------ mini_hard


@pytest.fixture(scope="module")
def hard_examples():
    return [miniature.draw_example("train", index, scene=miniature.HARD) for index in range(96)]


def test_the_harder_set_has_more_objects_and_parts_some_of_them_rare():
    graph, presence = miniature.part_graph(miniature.HARD), miniature.presence(miniature.HARD)
    assert len(graph) >= 24 and len({part for parts in graph.values() for part in parts}) >= 100
    assert {label for family in miniature.instance_graph(miniature.HARD).values() for label in family} == set(graph)
    assert all(graph[label] == parts for label, parts in miniature.part_graph().items())
    shares = {share for parts in presence.values() for share in parts.values()}
    assert shares == {1.0, 0.5, 0.15}


def test_harder_drawings_are_larger_and_their_masks_cover_visible_pixels_of_one_object(hard_examples):
    graph = miniature.part_graph(miniature.HARD)
    labels = [example.image_label for example in hard_examples[:24]]
    assert len(set(labels)) == 24
    for example in hard_examples:
        assert example.image.size == (256, 256)
        masks = np.stack([decode(mask.rle) for mask in example.masks])
        assert masks.sum(axis=0).max() == 1
        assert masks.sum(axis=(1, 2)).min() >= miniature.HARD.min_visible_pixels
        assert {mask.label for mask in example.masks} <= set(graph[example.image_label])


def test_a_second_object_changes_pixels_that_belong_to_no_part(hard_examples):
    alone = replace(miniature.HARD, second_object=False)
    drawn = [miniature.draw_example("train", index, scene=alone) for index in range(12)]
    for example, other in zip(hard_examples, drawn, strict=False):
        assert not np.array_equal(np.asarray(example.image), np.asarray(other.image))
    coverage = [sum(area(mask.rle) for mask in example.masks) / 256**2 for example in hard_examples]
    assert 0.05 < np.mean(coverage) < 0.3
