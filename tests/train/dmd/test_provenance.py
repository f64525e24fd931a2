"""Samples that the step distillation accepts: made by its teacher and adapter, as its settings say."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint.fingerprint import fingerprint
from neodragon_jax.checkpoint.folders import FIRST_FRAME_UNET, TEACHER, TEACHER_ADAPTER
from neodragon_jax.generation.defaults import RELEASED
from support.goldens import TINY_CHECKPOINT
from support.point_world import point_program
from train.data import ArraySpec, RecordSpec, SampleSource, SampleWriter
from train.dmd import program as dmd
from train.dmd.evaluation import EvaluationConfig
from train.dmd.objectives.regression import RegressionConfig
from train.dmd.objectives.weighted import ObjectivesConfig
from train.dmd.own_history import OwnHistoryConfig
from train.dmd.provenance import check_samples

CONFIG = dmd.DMDConfig(checkpoint=str(TINY_CHECKPOINT), protocol='21', dtype='float32', remat='none')
RECORD = {
    'adapter': fingerprint(TINY_CHECKPOINT / TEACHER_ADAPTER),
    'teacher': fingerprint(TINY_CHECKPOINT / TEACHER),
    'guidance': 5.0,
    'first_guidance': 7.0,
    'steps': [10, 10, 10],
    'first_steps': [20, 20, 20],
    'first_frame': 'generated',
    'prompt_count': 3,
}
DRAWN = {'first_frame': 'model', 'first_frame_model': fingerprint(TINY_CHECKPOINT / FIRST_FRAME_UNET)}
LATENTS, MASK, POOLED = (2, 8, 8, 16), np.ones(4, np.int32), np.zeros(48, np.float32)
# Arrays of train.latents with --text ids and --text t5, and of train.prompts.
CONTENTS = {
    'ids': {'latents': np.zeros(LATENTS, np.float32), 'ids': MASK, 'text_mask': MASK},
    't5': {'latents': np.zeros(LATENTS, np.float32), 't5': np.zeros((4, 64), np.float32), 'text_mask': MASK},
    'prompts': {'ids': MASK, 'text_mask': MASK},
}


def samples(folder: Any, sample: dict[str, np.ndarray], protocol: dict[str, Any]) -> SampleSource:
    specs = {name: ArraySpec(array.shape, str(array.dtype)) for name, array in sample.items()}
    with SampleWriter(folder, RecordSpec(specs), 2, protocol=protocol) as writer:
        for index in writer.missing():
            writer.append(sample | {'index': index, 'prompt': 'a kite'})
    return SampleSource(folder)


@pytest.mark.parametrize('content', CONTENTS)
@pytest.mark.parametrize('protocol', [{}, {'adapter': None}])
def test_samples_without_an_adapter_are_refused_in_one_line(tmp_path, content, protocol):
    source = samples(tmp_path / 'samples', CONTENTS[content], {'content': content} | protocol)
    with pytest.raises(InputError, match=r'come from no context adapter.*train\.teacher_samples') as error:
        dmd.load_program(CONFIG, source)
    assert '\n' not in str(error.value)


def test_samples_made_as_the_settings_say_are_accepted():
    check_samples(CONFIG, RECORD)
    for source in ({'first_frame': 'pictures'}, DRAWN):
        check_samples(dataclasses.replace(CONFIG, protocol='18'), RECORD | source)
    # Unit 0 is a picture, so its sampling settings do not matter.
    pictures = {'first_frame': 'pictures', 'first_guidance': 1.0, 'first_steps': [1, 1, 1]}
    check_samples(dataclasses.replace(CONFIG, protocol='18'), RECORD | pictures)
    # Where only first frames are used, no unit is sampled.
    prompts = {'objectives': ObjectivesConfig(regression=RegressionConfig(weight=0.0)), 'input': 'prompts'}
    prompts |= {'own_history': OwnHistoryConfig(first=1.0, last=1.0), 'protocol': '18'}
    others = DRAWN | {'steps': [2, 2, 2], 'guidance': 2.0}
    check_samples(dataclasses.replace(CONFIG, **prompts), RECORD | others)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'teacher': 'another'}, r'made by the teacher another, the checkpoint .*tiny_checkpoint has'),
        ({'guidance': 2.0}, r'guidance 2.0, config.dmd.guidance is 5.0.* --guidance'),
        ({'first_guidance': 2.0}, r'first_guidance 2.0, config.dmd.first_guidance is 7.0'),
        ({'steps': [2, 2, 2]}, r'steps \[2, 2, 2\], config.dmd.teacher_steps is \[10, 10, 10\].* --steps'),
        ({'first_steps': [2, 2, 2]}, r'first_steps \[2, 2, 2\], config.dmd.teacher_first_steps'),
        ({'first_frame': 'pictures'}, r'protocol 21 needs samples whose first frame comes from generated'),
    ],
)
def test_samples_made_otherwise_are_refused_in_one_line(changes, message):
    with pytest.raises(InputError, match=message) as error:
        check_samples(CONFIG, RECORD | changes)
    assert '\n' not in str(error.value)


def test_first_frames_of_another_model_are_refused():
    config = dataclasses.replace(CONFIG, protocol='18')
    with pytest.raises(InputError, match=r'drawn by the first-frame model another, the checkpoint .* has'):
        check_samples(config, RECORD | DRAWN | {'first_frame_model': 'another'})


def test_a_first_frame_model_that_is_not_here_is_not_asked_for(tmp_path, capsys):
    """On a pod, the distillation downloads only the components that it runs."""
    root = tmp_path / 'checkpoint'
    root.mkdir()
    for name in (TEACHER, TEACHER_ADAPTER):
        (root / name).symlink_to(TINY_CHECKPOINT / name)
    check_samples(dataclasses.replace(CONFIG, checkpoint=str(root), protocol='18'), RECORD | DRAWN)
    assert f'{FIRST_FRAME_UNET} is not here' in capsys.readouterr().out


def test_what_an_earlier_version_did_not_record_is_told_and_not_refused(capsys):
    """Such samples train as before, and a run on them resumes."""
    config = dataclasses.replace(CONFIG, protocol='18', evaluation=EvaluationConfig(videos=1))
    check_samples(config, RECORD | DRAWN)
    assert not capsys.readouterr().out
    for key, message in {'first_frame_model': 'first-frame model that', 'prompt_count': 'how many prompts'}.items():
        check_samples(config, {name: value for name, value in (RECORD | DRAWN).items() if name != key})
        said = capsys.readouterr().out
        assert said.startswith('warning: an earlier version made the samples and did not record') and message in said


def test_another_modifier_of_the_prompts_is_named(capsys):
    check_samples(CONFIG, RECORD | {'prompt_modifier': RELEASED.prompt_modifier})
    assert not capsys.readouterr().out
    check_samples(CONFIG, RECORD | {'prompt_modifier': ', as a sketch'})
    assert "warning: the samples were made with prompt_modifier ', as a sketch'" in capsys.readouterr().out


def test_the_external_first_frame_must_be_one():
    with pytest.raises(InputError, match=r'from model or pictures, these come from generated.* --first-frame model'):
        check_samples(dataclasses.replace(CONFIG, protocol='18'), RECORD)


def test_other_samples_do_not_continue_a_run():
    """A checkpoint and a run agree on everything in the samples' record, such as its prompts and seed."""
    program = point_program()
    program.samples = RECORD | {'seed': 0}
    before = program.metadata()
    program.samples = RECORD | {'seed': 1}
    assert before != program.metadata()
    assert before['samples']['seed'] == 0
