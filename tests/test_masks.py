import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from inputs_plum import MAX_PERIMETER
from plum_partonomy import masks
from plum_partonomy.masks import DataError

bool_masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40))


@given(bool_masks)
def test_decoding_an_encoded_mask_gives_the_mask_back(mask):
    rle = masks.encode(mask)
    np.testing.assert_array_equal(masks.decode(rle, expected_size=mask.shape), mask)
    assert masks.area(rle) == mask.sum()


@given(bool_masks)
def test_uncompressed_run_lengths_decode_to_the_same_mask(mask):
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(np.concatenate([[False], pixels]).astype(int))).tolist()
    runs = np.diff([0, *changes, pixels.size]).tolist()
    np.testing.assert_array_equal(masks.decode({"size": list(mask.shape), "counts": runs}), mask)


@given(bool_masks, st.data())
def test_a_union_holds_the_pixels_of_every_mask(mask, data):
    other = data.draw(hnp.arrays(bool, mask.shape))
    union = masks.union([masks.encode(mask), masks.encode(other)])
    np.testing.assert_array_equal(masks.decode(union), mask | other)


@given(bool_masks, st.data())
def test_counts_that_do_not_fill_the_size_are_refused_before_decoding(mask, data):
    rle = masks.encode(mask)
    height = data.draw(st.integers(1, 80).filter(lambda value: value != mask.shape[0]))
    with pytest.raises(DataError, match="the counts decode to"):
        masks.decode({"size": [height, mask.shape[1]], "counts": rle["counts"]})


@given(st.text(max_size=60), st.integers(1, 30), st.integers(1, 30))
def test_any_text_either_fills_the_size_exactly_or_is_refused(counts, height, width):
    try:
        mask = masks.decode({"size": [height, width], "counts": counts})
    except DataError:
        return
    assert mask.shape == (height, width)
    assert masks.area(masks.encode(mask)) == mask.sum()


def test_the_error_names_the_place_and_both_sizes():
    rle = masks.encode(np.ones((4, 6), dtype=bool))
    with pytest.raises(DataError, match=r"file, record 3, field 'wing': .*\[4, 6\].*\[6, 4\]"):
        masks.decode(rle, expected_size=(6, 4), where="file, record 3, field 'wing'")


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        (None, "expected an RLE"),
        ({"size": [4, 4]}, "expected an RLE"),
        ({"size": [4, 0], "counts": ""}, "two positive integers"),
        ({"size": [4, True], "counts": ""}, "two positive integers"),
        ({"size": [4.0, 4], "counts": ""}, "two positive integers"),
        ({"size": [100_000, 100_000], "counts": ""}, "exceeds the limit"),
        ({"size": [4, 4], "counts": b"P4"}, "expected counts as text"),
        ({"size": [4, 4], "counts": [20, -4]}, "expected counts as text"),
        ({"size": [4, 4], "counts": [17]}, "more than 16 pixels"),
        ({"size": [4, 4], "counts": "é"}, "which no RLE has"),
        ({"size": [4, 4], "counts": "o" * 1000}, "which no RLE has"),
        ({"size": [4, 4], "counts": "o"}, "in the middle of a run"),
        ({"size": [4, 4], "counts": "@"}, "negative run length"),
    ],
)
def test_malformed_masks_are_refused_with_their_reason(rle, message):
    with pytest.raises(DataError, match=message):
        masks.decode(rle)


def test_the_counts_of_a_larger_mask_are_refused_instead_of_being_written_past_the_end():
    forged = coco.encode(np.asfortranarray(np.ones((64, 64), dtype=np.uint8)))["counts"].decode()
    with pytest.raises(DataError, match="more than 16 pixels, but size"):
        masks.decode({"size": [4, 4], "counts": forged})


def test_a_polygon_covers_the_pixels_inside_it():
    rle = masks.polygons_to_rle([[2, 1, 6, 1, 6, 4, 2, 4]], size=(8, 10))
    expected = np.zeros((8, 10), dtype=bool)
    expected[1:4, 2:6] = True
    np.testing.assert_array_equal(masks.decode(rle), expected)


@pytest.mark.parametrize(
    ("polygons", "message"),
    [
        ([], "a list of polygons"),
        ([[0, 0, 1, 1]], "at least three"),
        ([[0, 0, 1, 1, 2]], "at least three"),
        ([[0, 0, 1, 1, True, 2]], "at least three"),
        ([[0, 0, 1, 1, float("nan"), 2]], "near the image"),
        ([[0, 0, 1, 1, float("-inf"), 2]], "near the image"),
        ([[0, 0, 1, 1, 10**9, 2]], "near the image"),
        ([[0, 0, 1, 1, 10**400, 2]], "near the image"),
    ],
)
def test_malformed_polygons_are_refused_with_their_reason(polygons, message):
    with pytest.raises(DataError, match=message):
        masks.polygons_to_rle(polygons, size=(8, 8))


def test_outlines_that_are_too_long_to_draw_are_refused_however_few_points_each_has():
    zigzag = [value for y in range(3000) for value in (-4000 if y % 2 else 8000, y)]
    with pytest.raises(DataError, match=f"more than {MAX_PERIMETER}; give it as an RLE"):
        masks.polygons_to_rle([zigzag], size=(4000, 4000))
    triangles = [[0, 0, 4000, 0, 4000, 4000]] * 400
    with pytest.raises(DataError, match=f"more than {MAX_PERIMETER}"):
        masks.polygons_to_rle(triangles, size=(4000, 4000))


def test_a_fine_outline_of_thousands_of_points_is_drawn():
    angles = np.linspace(0, 2 * np.pi, 20_000, endpoint=False)
    circle = np.stack([500 + 400 * np.cos(angles), 500 + 400 * np.sin(angles)], axis=1).ravel().tolist()
    rle = masks.polygons_to_rle([circle], size=(1000, 1000))
    assert masks.area(rle) == pytest.approx(np.pi * 400**2, rel=1e-3)


def test_only_boolean_masks_are_encoded():
    with pytest.raises(ValueError, match="boolean mask"):
        masks.encode(np.zeros((3, 3), dtype=np.uint8))


def test_masks_of_two_sizes_have_no_union():
    with pytest.raises(ValueError, match="one size"):
        masks.union([masks.encode(np.ones((2, 3), dtype=bool)), masks.encode(np.ones((3, 2), dtype=bool))])
