"""Simulated clicks against a naive version, and by hand."""

import numpy as np

from plum_partonomy.scoring.clicks import Click, next_click


def regions(errors: np.ndarray) -> list[list[tuple[int, int]]]:
    """The connected regions of pixels, found by walking over their sides."""
    left, found = {tuple(place) for place in np.argwhere(errors).tolist()}, []
    while left:
        region, border = [], [min(left)]
        left.discard(border[0])
        while border:
            y, x = border.pop()
            region.append((y, x))
            for place in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if place in left:
                    left.discard(place)
                    border.append(place)
        found.append(sorted(region))
    return found


def naive_click(mask: np.ndarray, true: np.ndarray) -> Click | None:
    candidates = [(region, True) for region in regions(true & ~mask)]
    candidates += [(region, False) for region in regions(mask & ~true)]
    if not candidates:
        return None
    region, inside = max(candidates, key=lambda candidate: len(candidate[0]))
    height, width = mask.shape
    outside = [(y, x) for y in range(-1, height + 1) for x in range(-1, width + 1) if (y, x) not in region]

    def distance(place):
        return min((place[0] - y) ** 2 + (place[1] - x) ** 2 for y, x in outside)

    y, x = max(region, key=distance)
    return Click(x, y, inside)


def test_a_click_is_that_of_the_naive_version_on_random_masks():
    generator = np.random.default_rng(0)
    labels = set()
    for number in range(40):
        mask, true = generator.random((2, 9, 13)) < generator.uniform(0.2, 0.9)
        if number % 2:  # larger regions
            mask, true = (np.kron(side[:5, :7], np.ones((2, 2), dtype=bool))[:9, :13] for side in (mask, true))
        click = next_click(mask, true)
        assert click == naive_click(mask, true)
        labels.add(click.inside)
    assert labels == {True, False}


def test_regions_are_connected_over_sides_and_the_border_of_the_image_counts():
    true = np.zeros((20, 30), dtype=bool)
    true[:7, :7] = True  # at a corner: the centre, not the corner, is farthest from the border
    true[7:12, 7:12] = True  # touches it only over a corner
    assert next_click(np.zeros_like(true), true) == Click(3, 3, True)
    excess = true.copy()
    excess[14:20, 0:30] = True  # 180 pixels
    assert next_click(excess, true) == Click(2, 16, False)
    assert next_click(true, true) is None
    full = np.ones((1, 1), dtype=bool)
    assert next_click(full, ~full) == Click(0, 0, False) and next_click(~full, full) == Click(0, 0, True)


def test_clicks_on_a_mask_that_obeys_them_remove_its_errors():
    generator = np.random.default_rng(3)
    true, mask = np.zeros((2, 24, 24), dtype=bool)
    true[4:20, 6:18] = True
    mask[2:12, 3:15] = True
    wrong = (mask ^ true).sum()
    while (click := next_click(mask, true)) is not None:
        assert true[click.y, click.x] == click.inside != mask[click.y, click.x]
        region = next(region for region in regions(mask ^ true) if (click.y, click.x) in region)
        for y, x in generator.permutation(region)[: max(1, len(region) // 2)]:
            mask[y, x] = true[y, x]
        mask[click.y, click.x] = click.inside
        assert (mask ^ true).sum() < wrong
        wrong = (mask ^ true).sum()
    assert wrong == 0
