"""The measured blocks: their arithmetic is that of the formula, and wrong options are refused."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest

from neodragon_jax.config.neodragon import FULL
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.pyramid.history import envelope
from train.measure import blocks
from train.runtime.model_flops import traced_flops


@pytest.mark.parametrize('stage', [0, 2])
def test_flops_are_those_of_the_formula(stage):
    config = dataclasses.replace(FULL.denoiser, num_layers=3)
    layout = envelope(stage, blocks.UNITS, blocks.STAGES, blocks.GRID, blocks.TEXT)
    given = blocks.arguments(config, layout, batch=2)
    forward = blocks.gradient(PyramidMMDiT(config, jnp.bfloat16, scan=True), layout, forward=True)
    # Query, key, value and output, two of the MLP at four times the width; scores and weighted values.
    tokens, width = layout.tokens, config.width
    one_block = tokens * (4 + 2 * 4) * width**2 + 2 * tokens**2 * width
    assert traced_flops(forward, *given) == 2 * 2 * 2 * one_block


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--attentions', 'splush'], 'Did you mean "splash"'),
        (['--remats', 'all'], '--remats all: use none, full'),
        (['--stages', '3'], '--stages 3: stages are 0 to 2'),
        (['--stages', 'last'], '--stages last: write numbers'),
        (['--batch', '0'], '--batch 0: give at least 1'),
        (['--topology', 'v5x:1x1'], 'v5x'),
    ],
)
def test_wrong_options_are_refused(arguments, message, capsys):
    assert blocks.main(arguments) == 2
    assert message in capsys.readouterr().err
