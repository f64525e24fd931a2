"""Unused arithmetic of an envelope: counted token by token, and reported by both programs of the pyramid."""

from __future__ import annotations

import pytest

from neodragon_jax.config.neodragon import FULL
from neodragon_jax.pyramid.history import envelope
from neodragon_jax.pyramid.schedule import Schedule
from train.flow.unused import unused, unused_in_stages

WIDTH, TEXT = 8, 3
LAYOUT = envelope(2, 3, 3, (4, 8), TEXT)  # frames of 2, 8, 32 and 32 tokens


def flops(tokens: int, pairs: int) -> float:
    return 2.0 * (12 * tokens * WIDTH**2 + 2 * pairs * WIDTH)


def count(unit: int) -> tuple[int, int]:
    """Return the tokens of a unit and the pairs that may see each other, frame by frame."""
    frames = [rows * columns for rows, columns in LAYOUT.grids][-(unit + 1) :]
    # Text stands at frame 0 and sees only that frame and itself.
    pairs = TEXT * (TEXT + frames[0])
    for number, queries in enumerate(frames):
        pairs += queries * (TEXT + sum(frames[: number + 1]))
    return TEXT + sum(frames), pairs


@pytest.mark.parametrize('unit', [0, 1, 3])
def test_shares_of_one_unit_are_those_counted_by_frames(unit):
    tokens, pairs = count(unit)
    whole = flops(LAYOUT.tokens, LAYOUT.tokens**2)
    found = unused([(LAYOUT, {unit: 2.0})], WIDTH)
    assert found.padding == pytest.approx((whole - flops(tokens, tokens**2)) / whole)
    assert found.masked == pytest.approx((flops(tokens, tokens**2) - flops(tokens, pairs)) / whole)
    assert (found.padding == 0) == (unit == 3)


def test_units_count_by_their_frequency():
    of = lambda units: unused([(LAYOUT, units)], WIDTH).padding
    assert of({1: 3.0, 3: 1.0}) == pytest.approx(0.75 * of({1: 1.0}))


def test_released_sizes():
    """At the last unit of stage 2, 65% of the scores are allowed; padding takes 7% over units 1 to 6."""

    class Shape:
        def __init__(self, *shape):
            self.shape = shape

    sample = {'latents': Shape(7, 40, 64, 16), 'text_mask': Shape(128)}
    given = sample, FULL.denoiser, Schedule()
    last = unused_in_stages([2], *given, first_unit=6, unit_weights=(1.0,))
    assert last.padding == 0
    assert last.masked == pytest.approx(0.056, abs=0.002)
    assert unused_in_stages([2], *given, first_unit=1, unit_weights=()).padding == pytest.approx(0.07, abs=0.02)
