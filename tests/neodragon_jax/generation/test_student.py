"""Tests of the schedule of a distilled student."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.generation import defaults
from neodragon_jax.generation.options import VideoOptions
from neodragon_jax.generation.plan import make_plan, video_settings
from neodragon_jax.generation.student import with_student
from neodragon_jax.pyramid.schedule import Schedule

RECORD = {'student_steps': [2, 2, 1], 'student_first_steps': [3, 2, 1], 'spacing': 'even', 'protocol': '21'}


def test_the_plan_has_the_student_s_steps_and_levels(tmp_path):
    (tmp_path / 'student.json').write_text(json.dumps(RECORD))
    plan = make_plan('hybrid', 17, 64, 64, defaults=with_student(defaults.RELEASED, tmp_path).hybrid)
    assert (plan.steps, plan.first_steps) == ((2, 2, 1), (3, 2, 1))
    for stage in range(3):
        first, last = plan.schedule.timestep_limits[stage]
        timesteps, levels = plan.schedule.steps(stage, 2)
        np.testing.assert_allclose(levels, [1, 0.5, 0])
        np.testing.assert_allclose(timesteps, [first, (first + last) / 2])
    # Without a student, the released levels apply, whose last step is 0.001 long.
    released = make_plan('hybrid', 17, 64, 64, steps=(2, 2, 2)).schedule.steps(1, 2)
    np.testing.assert_allclose(released.levels, [1, 0.001, 0])


@pytest.mark.parametrize(('protocol', 'makes'), [('18', False), ('21', True)])
def test_a_student_that_learned_no_first_frame_makes_none(tmp_path, protocol, makes):
    (tmp_path / 'student.json').write_text(json.dumps(RECORD | {'protocol': protocol}))
    of_checkpoint = dataclasses.replace(
        defaults.RELEASED, hybrid=dataclasses.replace(defaults.RELEASED.hybrid, first_frame='denoiser')
    )
    chosen = with_student(of_checkpoint, tmp_path)
    given = np.zeros((64, 64, 3), np.uint8)
    for options in ({'first_frame': 'model'}, {'image': given}):
        video_settings(VideoOptions(frames=17, height=64, width=64, **options), 'hybrid', chosen)
    for options in ({}, {'first_frame': 'denoiser'}):
        with contextlib.nullcontext() if makes else pytest.raises(InputError, match=r'protocol 18.*give --image'):
            video_settings(VideoOptions(frames=17, height=64, width=64, **options), 'hybrid', chosen)


def test_one_step_is_the_released_one():
    even, released = Schedule(spacing='even'), Schedule()
    for stage in range(3):
        np.testing.assert_array_equal(even.steps(stage, 1).timesteps, released.steps(stage, 1).timesteps)


def test_without_a_record_nothing_changes(tmp_path):
    assert with_student(defaults.RELEASED, tmp_path) is defaults.RELEASED


@pytest.mark.parametrize(
    'record',
    [{}, RECORD | {'spacing': 'odd'}, RECORD | {'student_steps': [2, 2]}, RECORD | {'student_steps': [2, 0, 1]}, []],
)
def test_damaged_records_are_refused_in_one_line(tmp_path, record):
    (tmp_path / 'student.json').write_text(json.dumps(record))
    with pytest.raises(
        InputError, match=r'student\.json: (student_steps|spacing|the content).*copy the file again'
    ) as error:
        with_student(defaults.RELEASED, tmp_path)
    assert '\n' not in str(error.value)
