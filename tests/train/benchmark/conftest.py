"""Captions of the benchmark that several modules read."""

from __future__ import annotations

import dataclasses

import pytest

from train.benchmark.evaluation import HeldOutCaptions
from train.benchmark.tiers import TIERS


@pytest.fixture(scope='session')
def held_out() -> HeldOutCaptions:
    """Twelve captions of tier cpu."""
    return HeldOutCaptions(dataclasses.replace(TIERS['cpu'], captions=12))
