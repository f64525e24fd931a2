"""The calibration set on disk: resuming, damaged files, other protocols, and the selection of calls."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import zlib
from typing import Any

import numpy as np
import pytest

from export.graphs.runners import Call
from export.host.calibration_set import CalibrationSet
from export.host.protocol import Protocol
from export.host.recording import Scenes, Video
from neodragon_jax.base.errors import InputError
from neodragon_jax.generation.plan import make_plan
from neodragon_jax.pyramid.sampler import Prompt
from support.lost_files import lose

CALLS, KEEP, VIDEOS = 5, 2, 4
PROMPTS, EVALUATION, VALIDATION = ('one', 'two'), ('three', 'four'), ('five',)


def make_protocol(**changes: Any) -> Protocol:
    plan = make_plan('hybrid', 9, 64, 64)
    scenes = (Scenes(PROMPTS), Scenes(VALIDATION), Scenes(EVALUATION))
    protocol = Protocol({'vae': 'abc'}, *scenes, plan, {'video_decoder': KEEP}, VIDEOS, {'code_sha256': 'abc'})
    return dataclasses.replace(protocol, **changes)


class NoiseProgram:
    """A program of two graphs, whose calls are noise determined by the prompt and the number of the video."""

    def __init__(self) -> None:
        self.generated: list[str] = []

    def generate(self, scenes: Scenes, number: int) -> tuple[Video, dict[str, list[Call]]]:
        self.generated.append(scenes.text(number))
        rng = np.random.default_rng([zlib.crc32(scenes.text(number).encode()), number])
        draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
        calls = [Call({'latent': np.float32([[number, index]])}, {'frames': draw(3)}) for index in range(CALLS)]
        prompt = Prompt(draw(1, 2, 3), np.ones((1, 2), np.int32), draw(1, 3))
        return Video(prompt, None, None, draw(1, 2, 2, 2, 3), None), {'video_decoder': calls, 'clip_l': calls[:1]}


def record(folder: pathlib.Path, protocol: Protocol | None = None) -> tuple[CalibrationSet, NoiseProgram, list[str]]:
    program, lines = NoiseProgram(), list[str]()
    found = CalibrationSet.open(folder, protocol or make_protocol())
    found.record(lambda: program, lines.append)
    return found, program, lines


def test_prompts_take_turns_and_evaluation_has_its_own(tmp_path):
    found, program, _ = record(tmp_path)
    assert program.generated == [*EVALUATION, *VALIDATION, 'one', 'two', 'one', 'two']
    evaluation, validation = found.evaluation('video_decoder', 3), found.validation('video_decoder', 2)
    assert list(evaluation) == list(EVALUATION) and all(len(calls) == 3 for calls in evaluation.values())
    assert list(validation) == list(VALIDATION) and all(len(calls) == 2 for calls in validation.values())
    calibration = list(found.calls('video_decoder', 100))
    assert len(calibration) == VIDEOS * KEEP
    seen = {call.outputs['frames'].tobytes() for call in calibration}
    for held_out in (evaluation, validation):
        assert not [call for calls in held_out.values() for call in calls if call.outputs['frames'].tobytes() in seen]


def test_every_prompt_meets_all_steps(tmp_path):
    """Also with as many prompts as steps and one kept call per video."""
    scenes = Scenes([f'prompt {index}' for index in range(CALLS)])
    found, *_ = record(tmp_path, make_protocol(scenes=scenes, keep={'video_decoder': 1}, videos=CALLS * CALLS))
    calls = [call.inputs['latent'][0].astype(int) for call in found.calls('video_decoder', 1000)]
    assert {(number % CALLS, step) for number, step in calls} == {(p, s) for p in range(CALLS) for s in range(CALLS)}


def test_a_killed_recording_resumes(tmp_path):
    first, *_ = record(tmp_path)
    before = [call.outputs['frames'] for call in first.calls('video_decoder', 100)]
    for path in (tmp_path / 'calibration-00001').iterdir():
        path.unlink()
    (tmp_path / 'calibration-00001').rmdir()
    again, program, lines = record(tmp_path)
    assert program.generated == ['two']
    assert [line for line in lines if line.endswith('recorded')] == [f'calibration video 2 of {VIDEOS}: recorded']
    np.testing.assert_array_equal([call.outputs['frames'] for call in again.calls('video_decoder', 100)], before)


@pytest.mark.parametrize('video', ['evaluation-00001', 'validation-00000', 'calibration-00002'])
@pytest.mark.parametrize('name', ['video_decoder.npz', 'record.json'])
@pytest.mark.parametrize('cut', [0, 40])
def test_damaged_videos_are_recorded_again(video, name, cut, tmp_path):
    record(tmp_path)
    path = tmp_path / video / name
    before = path.read_bytes()
    path.write_bytes(before[:cut])
    found, program, lines = record(tmp_path)
    assert len(program.generated) == 1
    (line,) = [line for line in lines if 'recorded again, because' in line]
    assert name in line
    assert len(list(found.calls('video_decoder', 100))) == VIDEOS * KEEP
    assert record(tmp_path)[1].generated == []


def test_a_changed_bit_is_noticed(tmp_path):
    record(tmp_path)
    path = tmp_path / 'calibration-00000' / 'video_decoder.npz'
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert 'content of video_decoder.npz has changed' in ' '.join(record(tmp_path)[2])


@pytest.mark.parametrize('content', ['', '{"format": 3', '[]', '{"format": 3}', '\x00\x01'])
def test_a_damaged_protocol_is_one_line(content, tmp_path):
    record(tmp_path)
    (tmp_path / 'protocol.json').write_text(content)
    with pytest.raises(InputError, match=r'protocol\.json: damaged\. Remove ') as failure:
        record(tmp_path)
    assert '\n' not in str(failure.value)


@pytest.mark.parametrize('name', ['protocol.json', 'record.json'])
def test_a_record_that_the_system_cannot_read_is_not_damaged(name, tmp_path, monkeypatch):
    """The set takes hours to record; the message on a damaged one says to remove it."""
    record(tmp_path)
    lose(monkeypatch, name)
    with pytest.raises(OSError, match=name):
        record(tmp_path)
    monkeypatch.undo()
    assert not record(tmp_path)[1].generated


def test_other_protocols_are_refused_and_larger_sets_serve(tmp_path):
    record(tmp_path)
    with pytest.raises(InputError, match='recorded with other evaluation prompts, seed'):
        scenes = Scenes(PROMPTS, seed=1)
        record(tmp_path, make_protocol(scenes=scenes, evaluation=Scenes(EVALUATION[:1], seed=1)))
    found, program, lines = record(tmp_path, make_protocol(videos=2, keep={'video_decoder': 1}))
    assert not program.generated and found.protocol.videos == VIDEOS
    assert len(lines) == found.videos == VIDEOS + len(VALIDATION) + len(EVALUATION)
    path = tmp_path / 'protocol.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'videos': 'many'}))
    with pytest.raises(InputError, match='recorded with other videos'):
        record(tmp_path)


OTHER_CODE = {'code_sha256': 'other'}


def test_other_code_records_again_and_resumes(tmp_path):
    """As every finished step; an interruption leaves a set of videos of both codes."""
    record(tmp_path)
    changed = make_protocol(made_by=OTHER_CODE)
    _, program, lines = record(tmp_path, changed)
    assert len(program.generated) == len(lines) == VIDEOS + len(VALIDATION) + len(EVALUATION)
    assert all('recorded again, because it was recorded by other code' in line for line in lines)
    assert not record(tmp_path, changed)[1].generated
    CalibrationSet.open(tmp_path, make_protocol())
    assert len(record(tmp_path)[1].generated) == len(lines), 'the videos, not the protocol, say what is recorded'


SMALLER = [
    {'videos': 2},
    {'keep': {'video_decoder': 1}},
    {'keep': {'clip_l': 1}},
    {'validation': Scenes(())},
    {'videos': 1, 'keep': {'video_decoder': 1}, 'validation': Scenes(())},
]


@pytest.mark.parametrize('smaller', SMALLER)
@pytest.mark.parametrize('lost', [0, 2])
def test_other_code_records_what_it_needs_of_a_larger_set(tmp_path, smaller, lost):
    """A set is no less repeatable for being larger, or not finished. Its graphs may be more than this program runs."""
    record(tmp_path, make_protocol(keep={'video_decoder': KEEP, 'clip_l': 1}))
    for number in range(VIDEOS - lost, VIDEOS):
        shutil.rmtree(tmp_path / f'calibration-{number:05d}')
    changed = make_protocol(made_by=OTHER_CODE, **smaller)
    found, program, lines = record(tmp_path, changed)
    assert found.protocol == changed and len(program.generated) == len(lines) == found.videos
    for name, kept in changed.keep.items():
        assert len(list(found.calls(name, 100))) == changed.videos * kept
    assert not record(tmp_path, changed)[1].generated


def test_other_code_keeps_the_validation_prompts_of_the_set(tmp_path):
    """An export without quantized graphs in between."""
    record(tmp_path)
    record(tmp_path, make_protocol(validation=Scenes(()), made_by=OTHER_CODE))
    assert record(tmp_path, make_protocol(made_by=OTHER_CODE))[1].generated == list(VALIDATION)


@pytest.mark.parametrize('other', [{'components': {'vae': 'xyz'}}, {'scenes': Scenes(PROMPTS, seed=1)}, {'videos': 5}])
def test_other_code_with_other_inputs_is_refused(tmp_path, other):
    record(tmp_path)
    with pytest.raises(InputError, match=r'recorded with other .*code and tools'):
        record(tmp_path, make_protocol(made_by=OTHER_CODE, **other))
    assert not record(tmp_path)[1].generated


def test_a_lost_protocol_does_not_make_old_videos_pass_for_new(tmp_path):
    record(tmp_path)
    (tmp_path / 'protocol.json').unlink()
    assert not record(tmp_path)[1].generated
    (tmp_path / 'protocol.json').unlink()
    *_, lines = record(tmp_path, make_protocol(scenes=Scenes(PROMPTS, seed=1)))
    assert all('recorded again' in line for line in lines)


def test_sets_without_validation_videos_serve_the_same_calls(tmp_path):
    record(tmp_path)
    assert not record(tmp_path, make_protocol(validation=Scenes(())))[1].generated


def test_a_larger_set_is_not_repaired_by_a_smaller_export(tmp_path):
    """The smaller one does not run all graphs of the set."""
    record(tmp_path)
    smaller = make_protocol(videos=2, keep={'video_decoder': 1})
    path = tmp_path / 'calibration-00001' / 'video_decoder.npz'
    path.write_bytes(b'')
    with pytest.raises(InputError, match=r'video_decoder\.npz has 0 bytes .*more graphs or videos than this export'):
        record(tmp_path, smaller)
    assert len(record(tmp_path)[1].generated) == 1


def test_other_formats_are_named_alone(tmp_path):
    record(tmp_path)
    path = tmp_path / 'protocol.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'format': 5, 'weights of vae': 'abc'}))
    with pytest.raises(InputError, match=r'recorded with other format\. Remove it'):
        record(tmp_path)
