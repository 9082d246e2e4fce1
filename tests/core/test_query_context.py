"""Query windows and their contexts: the square by loops, and its limits."""

from __future__ import annotations

import math

import pytest

from foveate.patterns import QueryContextWindows, Windows


@pytest.mark.parametrize(
    ("shape", "window", "ratio"),
    [((8, 12), (2, 3), 2), ((9, 6), (3, 1), (3, 5)), ((10,), 5, 2), ((8, 8), 2, 4)],
)
def test_it_is_the_square_around_the_window_moved_inwards(shape, window, ratio):
    pattern = QueryContextWindows(shape, window, ratio)
    sees = pattern.layout(math.prod(shape)).to_dense()[0, 0]
    cells = (
        [(y, x) for y in range(shape[0]) for x in range(shape[-1])]
        if len(shape) == 2
        else [(y,) for y in range(shape[0])]
    )

    def inside(query, key):
        for t, s, n, p, r in zip(query, key, shape, pattern.window, pattern.ratio, strict=True):
            first = t // p * p - math.ceil((r - 1) * p / 2)
            first = max(0, min(first, n - r * p))
            if not first <= s < first + r * p:
                return False
        return True

    assert sees.tolist() == [[inside(query, key) for key in cells] for query in cells]


def test_limits():
    assert QueryContextWindows((6, 8), 2, 1).layout(48) == Windows((6, 8), 2).layout(48)
    assert QueryContextWindows((6, 8), 2, (3, 4)).layout(48).area == 48 * 48
    assert QueryContextWindows((8, 8), 2, 2).layout(64).area == 64 * 16  # as many keys for every query


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((8, 8), 3, 2), "window must divide shape, got 3 for an axis of 8"),
        (((8, 8), 2, 5), r"ratio \* window must be at most the axis, got 5 \* 2 for an axis of 8"),
        (((8, 8), 2, 0), "ratio must be an int >= 1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        QueryContextWindows(*arguments)
