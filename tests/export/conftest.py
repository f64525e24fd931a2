"""Fixtures: the graphs of the miniature checkpoint, and a bundle of the shipped one.

The bundle has float graphs, to compare the player with JAX without rounding. Its denoiser is exported as a student with
a schedule of its own: steps that differ by stage and from those of unit 0.
"""

import json
import pathlib
import shutil
from typing import Any

import pytest
from neodragon_phone.backends import open_backend
from neodragon_phone.bundle import Bundle
from neodragon_phone.player import Player

from export.__main__ import main
from export.graphs.table import PhoneGraph
from export.host import modules
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders, shipped
from neodragon_jax.generation.plan import make_plan
from neodragon_jax.models.mmdit import PyramidMMDiT
from support.goldens import TINY_CHECKPOINT
from support.shared import shared_folder

STUDENT = {'student_steps': [1, 2, 1], 'student_first_steps': [2, 1, 1], 'spacing': 'even'}


@pytest.fixture(scope='session')
def options(upscaler) -> modules.ProgramOptions:
    return modules.ProgramOptions(TINY_CHECKPOINT, 'hybrid', make_plan('hybrid', 9, 64, 64), None, upscaler)


@pytest.fixture(scope='session')
def graphs(options) -> dict[str, PhoneGraph]:
    return modules.phone_modules(options)


@pytest.fixture(scope='session')
def denoiser() -> tuple[PyramidMMDiT, dict[str, Any]]:
    model, params = checkpoint.load(TINY_CHECKPOINT / 'diffusion_transformer_320p')
    assert isinstance(model, PyramidMMDiT)
    return model, params


@pytest.fixture(scope='session')
def student_folder(tmp_path_factory) -> pathlib.Path:
    """The shipped multi-step denoiser as a student with the schedule STUDENT: any levels are valid for it."""

    def make(student: pathlib.Path) -> None:
        root = shipped.find('moving_shapes')
        shutil.copytree(root / folders.TEACHER, student / folders.STUDENT)
        shutil.copytree(root / folders.TEACHER_ADAPTER, student / folders.STUDENT_ADAPTER)
        (student / 'student.json').write_text(json.dumps(STUDENT))

    return shared_folder(tmp_path_factory, 'student', make)


@pytest.fixture(scope='session')
def bundle_arguments(student_folder) -> list[str]:
    """Arguments of the export, without --out."""
    options = ['--precision', 'fp16', '--frames', '9', '--evaluation-samples', '1', '--no-simulate', '--no-whole-video']
    return ['--checkpoint', 'moving_shapes', *options, '--student', str(student_folder)]


@pytest.fixture(scope='session')
def bundle_folder(bundle_arguments, tmp_path_factory) -> pathlib.Path:
    def make(out: pathlib.Path) -> None:
        assert main([*bundle_arguments, '--out', str(out)]) == 0

    return shared_folder(tmp_path_factory, 'export', make) / 'bundle'


@pytest.fixture
def player(bundle_folder) -> Player:
    bundle = Bundle.open(bundle_folder)
    return Player(bundle, open_backend('cpu', bundle, None))
