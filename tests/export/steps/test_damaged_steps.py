"""Every file of every step of a finished export: lost or damaged, it is made again, with a line that says why."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from export.__main__ import main
from export.steps.phone_bundle import FOLDER, RECORD
from export.steps.step_cache import METADATA, finished
from neodragon_jax.generation import defaults


@pytest.fixture(scope='module')
def out(bundle_folder, tmp_path_factory) -> pathlib.Path:
    """A copy of a finished export."""
    return pathlib.Path(shutil.copytree(bundle_folder.parent, tmp_path_factory.mktemp('copy') / 'export'))


def records(out: pathlib.Path) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """Yield the folder and the record of every step; videos of the calibration set have a test of their own."""
    for folder in sorted(path for path in out.iterdir() if path.is_dir() and path.name != 'calibration'):
        yield folder, out / RECORD if folder.name == FOLDER else folder / METADATA


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.qnn
@pytest.mark.parametrize('harm', [pathlib.Path.unlink, cut])
def test_no_file_of_a_step_is_lost_or_damaged_unnoticed(harm: Callable[[pathlib.Path], None], out, capsys):
    steps = list(records(out))
    assert {'bundle', 'clip_l-onnx-fp16', 'denoiser-qnn-fp16-sm8750'} <= {folder.name for folder, _ in steps}
    for folder, record in steps:
        source = json.loads(record.read_text())['source']
        assert finished(folder, source, record) is not None
        for path in [record, *(path for path in folder.rglob('*') if path.is_file() and path != record)]:
            content = path.read_bytes()
            harm(path)
            capsys.readouterr()
            assert finished(folder, source, record) is None, path
            (line,) = capsys.readouterr().out.splitlines()
            assert str(folder) in line and path.name in line and 'making it again' in line
            path.write_bytes(content)
        assert finished(folder, source, record) is not None


@pytest.fixture
def export_again(bundle_arguments, out, capsys) -> Callable[..., list[str]]:
    """Run the command again with more options; return its lines about steps that are made again."""

    def run(*options: str) -> list[str]:
        capsys.readouterr()
        assert main([*bundle_arguments, '--out', str(out), *options]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if 'making it again' in line]

    return run


def contents(folder: pathlib.Path) -> dict[str, Any]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.long
@pytest.mark.qnn
@pytest.mark.parametrize('name', ['manifest.json', 'manifest.json.sha256', 'README.md'])
def test_a_damaged_bundle_is_repaired(name, out, export_again):
    before = contents(out / FOLDER)
    (out / FOLDER / name).write_text('{')
    (line,) = export_again()
    assert f'{FOLDER}: {name} has 1 bytes' in line
    assert contents(out / FOLDER) == before
    assert export_again() == []


@pytest.mark.qnn
def test_a_lost_record_makes_the_bundle_again(out, export_again):
    (out / RECORD).unlink()
    (line,) = export_again()
    assert f'{FOLDER}: {RECORD} is missing' in line and (out / RECORD).is_file()


@pytest.mark.long
@pytest.mark.qnn
def test_texts_and_recorded_calls_are_inputs_of_the_bundle(out, export_again, monkeypatch):
    read = defaults.read
    monkeypatch.setattr(defaults, 'read', lambda root: dataclasses.replace(read(root), example='a red ring'))
    call = out / FOLDER / 'vectors' / 'denoiser_stage2.bin'
    before = call.read_bytes()
    assert export_again() == [], 'nothing is damaged'
    assert json.loads((out / FOLDER / 'manifest.json').read_text())['video']['example'] == 'a red ring'
    assert call.read_bytes() == before
    assert export_again('--evaluation-samples', '2') == []
    assert call.read_bytes() != before, 'the last of two calls, not the only one'
