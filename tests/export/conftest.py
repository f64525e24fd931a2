"""Fixture: a bundle of the shipped checkpoint with float graphs, to compare the player with JAX without rounding."""

import pathlib

import pytest
from neodragon_phone.backends import open_backend
from neodragon_phone.bundle import Bundle
from neodragon_phone.player import Player

from export.__main__ import main


@pytest.fixture(scope='session')
def bundle_folder(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp('export')
    options = ['--precision', 'fp16', '--frames', '9', '--evaluation-samples', '1', '--no-simulate', '--no-whole-video']
    assert main(['--checkpoint', 'moving_shapes', *options, '--out', str(out)]) == 0
    return out / 'bundle'


@pytest.fixture
def player(bundle_folder) -> Player:
    bundle = Bundle.open(bundle_folder)
    return Player(bundle, open_backend('cpu', bundle, None))
