"""Tests of training results in place of a checkpoint's components."""

from __future__ import annotations

import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint.folders import STUDENT, TEACHER, TEACHER_ADAPTER
from neodragon_jax.checkpoint.results import find_result, find_teacher
from support.goldens import TINY_CHECKPOINT


def test_a_result_is_found_in_its_run(tmp_path):
    (tmp_path / 'run' / 'result' / STUDENT).mkdir(parents=True)
    for given in (tmp_path / 'run', tmp_path / 'run' / 'result', str(tmp_path / 'run')):
        assert find_result(given, (STUDENT,), '--student') == tmp_path / 'run' / 'result'
    with pytest.raises(InputError, match=rf'--student .*: no {STUDENT} in it or in its folder "result"'):
        find_result(tmp_path, (STUDENT,), '--student')
    with pytest.raises(InputError, match=r'--student .*nowhere: no such folder'):
        find_result(tmp_path / 'nowhere', (STUDENT,), '--student')


def test_a_teacher_s_adapter_is_the_checkpoint_s_unless_the_result_has_one(tmp_path):
    assert find_teacher(TINY_CHECKPOINT, None, '--teacher') == (
        TINY_CHECKPOINT / TEACHER,
        TINY_CHECKPOINT / TEACHER_ADAPTER,
    )
    result = tmp_path / 'result'
    (result / TEACHER).mkdir(parents=True)
    assert find_teacher(TINY_CHECKPOINT, tmp_path, '--teacher') == (result / TEACHER, TINY_CHECKPOINT / TEACHER_ADAPTER)
    (result / TEACHER_ADAPTER).mkdir()
    assert find_teacher(TINY_CHECKPOINT, result, '--teacher') == (result / TEACHER, result / TEACHER_ADAPTER)
