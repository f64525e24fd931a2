"""Selection of the calls for the simulator, and warnings that ratios may not hold for other prompts."""

from __future__ import annotations

import numpy as np
import pytest

from export.graphs.runners import Call
from export.host.protocol import Protocol
from export.host.recorded_graph import RecordedGraph
from export.host.recording import Scenes
from export.steps.ratios import simulated_calls
from export.steps.run import warnings_of
from neodragon_jax.generation.plan import make_plan


def make_call(number: int) -> Call:
    return Call({'x': np.float32([number])}, {'y': np.float32([number])})


@pytest.fixture
def recorded() -> RecordedGraph:
    """A graph with three evaluation prompts of two calls each."""
    calls = {prompt: [make_call(10 * index), make_call(10 * index + 1)] for index, prompt in enumerate('abc')}
    never = lambda: pytest.fail('not needed')
    return RecordedGraph('clip_l', ['y'], never, {}, '', never, never, lambda: calls)


def numbers(calls: list[Call]) -> list[int]:
    return [int(call.inputs['x'][0]) for call in calls]


def test_the_simulator_runs_the_calls_with_the_lowest_ratios(recorded):
    ratios = {'a': [40.0, 30.0], 'b': [45.0, 44.0], 'c': [20.0, 50.0]}
    assert numbers(simulated_calls(recorded, ratios, 2)) == [20, 1]
    assert numbers(simulated_calls(recorded, ratios, 3)) == [20, 1, 0]


def test_without_ratios_it_runs_calls_of_different_prompts(recorded):
    assert numbers(simulated_calls(recorded, None, 2)) == [0, 20]
    assert numbers(simulated_calls(recorded, None, 9)) == [0, 10, 20]


@pytest.mark.parametrize(
    ('prompts', 'videos', 'validated', 'evaluated', 'words'),
    [
        (12, 12, 4, 8, []),
        (12, 11, 4, 8, ['Calibrated on 11 prompt(s) only']),
        (1, 100, 4, 8, ['Calibrated on 1 prompt(s) only']),
        (48, 100, 3, 8, ['Settings are chosen on 3 prompt(s) only']),
        (48, 100, 4, 7, ['Evaluated on 7 prompt(s) only']),
        (48, 0, 0, 8, []),
        (
            2,
            2,
            1,
            1,
            ['Calibrated on 2 prompt(s) only', 'Settings are chosen on 1 prompt(s)', 'Evaluated on 1 prompt(s) only'],
        ),
    ],
)
def test_few_prompts_are_said_loudly(prompts, videos, validated, evaluated, words):
    scenes = (Scenes([str(number) for number in range(count)]) for count in (prompts, validated, evaluated))
    found = warnings_of(Protocol({}, *scenes, make_plan('hybrid', 9, 64, 64), {}, videos, {}))
    assert len(found) == len(words) and all(line.startswith(word) for line, word in zip(found, words, strict=True))
