"""The bits of keys and values: 8 only where single calls and whole videos of validation prompts reach their targets."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from export.graphs.table import GRAPH_SPECS
from export.host.recorded_graph import RecordedGraph
from export.steps import key_value_bits
from export.steps.key_value_bits import _choose

STAGES = [f'denoiser_stage{number}' for number in range(3)]
ENOUGH = {name: GRAPH_SPECS[name].target_db + 3.0 for name in STAGES}


@pytest.fixture
def choose(monkeypatch):
    """Choose with given lowest ratios of the stages' calls and of the videos' last frame; None generates no videos."""

    def run(calls_db: dict[str, float], video_db: float | None) -> Any:
        monkeypatch.setattr(key_value_bits, 'write_stage', lambda *args: None)
        monkeypatch.setattr(key_value_bits, 'OnnxSession', lambda path: path)
        monkeypatch.setattr(key_value_bits, 'lowest_db', lambda path, calls, compared: calls_db[path.stem])
        monkeypatch.setattr(key_value_bits, '_last_frame_db', lambda *args: video_db)
        nothing: Any = lambda: None
        graphs = [RecordedGraph(name, ['flow'], nothing, {}, '', nothing, nothing, nothing) for name in STAGES]
        program: Any = None if video_db is None else 'program'
        return _choose(graphs, program, nothing, pathlib.Path())

    return run


def test_8_bits_where_calls_and_videos_allow_it(choose):
    choice = choose(ENOUGH, 28.0)
    assert (choice.bits, choice.calls_db, choice.video_db) == (8, ENOUGH, 28.0)
    assert choose(ENOUGH, None).bits == 8 and choose(ENOUGH, None).video_db is None


def test_a_stage_below_its_aim_is_the_reason_for_16(choose):
    choice = choose(ENOUGH | {STAGES[1]: 24.9}, 40.0)
    assert choice.bits == 16 and list(choice.calls_db) == STAGES[:2], 'later stages are not tried'
    assert choice.reason == 'denoiser_stage1 reaches 24.9 dB with 8, of 25.0 asked for'


def test_errors_that_accumulate_are_a_reason_for_16(choose):
    choice = choose(ENOUGH, 27.9)
    assert (choice.bits, choice.video_db) == (16, 27.9)
    assert choice.reason == 'the last latent frame reaches 27.9 dB with 8, of 28.0 asked for'
