"""Fixtures: the C++ runner, built once, and a call of it that fails."""

import pathlib
import subprocess
from collections.abc import Callable

import onnxruntime
import pytest

from support.goldens import ROOT
from support.shared import shared_folder

SOURCE = ROOT / 'export' / 'player' / 'cpp'


@pytest.fixture(scope='session')
def runner(tmp_path_factory) -> pathlib.Path:
    def make(build: pathlib.Path) -> None:
        (library,) = (pathlib.Path(onnxruntime.__file__).parent / 'capi').glob('libonnxruntime.so.*')
        configure = ['cmake', '-S', SOURCE, '-B', build, f'-DONNXRUNTIME_LIBRARY={library}']
        subprocess.run(configure, check=True, capture_output=True)
        subprocess.run(['cmake', '--build', build], check=True, capture_output=True)

    return shared_folder(tmp_path_factory, 'cpp', make) / 'neodragon_runner'


@pytest.fixture
def refused(runner) -> Callable[..., str]:
    """Return a function that returns the error message of a call that fails."""

    def call(*arguments: object, **options) -> str:
        command = [str(argument) for argument in (runner, *arguments)]
        run = subprocess.run(command, capture_output=True, text=True, **options)
        assert run.returncode == 2 and run.stderr.startswith('error: ') and run.stderr.count('\n') == 1, run
        return run.stderr

    return call
