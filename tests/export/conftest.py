"""Fixture: a bundle of the shipped checkpoint with float graphs, to compare the player with JAX without rounding.

The denoiser is exported as a student with a schedule of its own: steps that differ by stage and from those of unit 0.
"""

import json
import pathlib
import shutil

import pytest
from neodragon_phone.backends import open_backend
from neodragon_phone.bundle import Bundle
from neodragon_phone.player import Player

from export.__main__ import main
from neodragon_jax.checkpoint import folders, shipped

STUDENT = {'student_steps': [1, 2, 1], 'student_first_steps': [2, 1, 1], 'spacing': 'even'}


@pytest.fixture(scope='session')
def student_folder(tmp_path_factory) -> pathlib.Path:
    """The shipped denoiser as a student with the schedule STUDENT."""
    student = tmp_path_factory.mktemp('student')
    for name in (folders.STUDENT, folders.STUDENT_ADAPTER):
        shutil.copytree(shipped.find('moving_shapes') / name, student / name)
    (student / 'student.json').write_text(json.dumps(STUDENT))
    return student


@pytest.fixture(scope='session')
def bundle_arguments(student_folder) -> list[str]:
    """Arguments of the export, without --out."""
    options = ['--precision', 'fp16', '--frames', '9', '--evaluation-samples', '1', '--no-simulate', '--no-whole-video']
    return ['--checkpoint', 'moving_shapes', *options, '--student', str(student_folder)]


@pytest.fixture(scope='session')
def bundle_folder(bundle_arguments, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp('export')
    assert main([*bundle_arguments, '--out', str(out)]) == 0
    return out / 'bundle'


@pytest.fixture
def player(bundle_folder) -> Player:
    bundle = Bundle.open(bundle_folder)
    return Player(bundle, open_backend('cpu', bundle, None))
