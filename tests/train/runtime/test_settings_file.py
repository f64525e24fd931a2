"""Settings of a command line: a wrong name or file is one line with the remedy, before anything else begins."""

from __future__ import annotations

import subprocess
import sys

import pytest

from neodragon_jax.base.errors import InputError
from support.goldens import ROOT
from support.program_lines import environment
from train.runtime.settings_file import check_command_line

DMD = '--config=configs/dmd.py:tiny'
FILES = {
    'import.py': 'import nonsuch',
    'syntax.py': 'def get_config(:',
    'open.py': 'open("/no/such/file")',
    'empty.py': '',
    'none.py': 'def get_config(): pass',
    'plain.py': 'def get_config():\n    from ml_collections import ConfigDict\n    return ConfigDict({"steps": 1})',
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text + '\n')
    monkeypatch.chdir(ROOT)
    return tmp_path


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--config.lop.steps=3'], 'config.lop: no such setting. Did you mean "loop"?'),
        (['--config.loop.stps', '3'], 'config.loop.stps: no such setting. Did you mean "steps"?'),
        (['-config.dmd.objectives.matchin.weight=1'], 'config.dmd.objectives.matchin: no such setting. Did you mean'),
        (['--noconfig.dmd.pair'], 'config.dmd.pair: no such setting. Did you mean "pairs"?'),
        # Names of methods of ConfigDict.
        (['--config.loop.keys=3'], 'config.loop.keys: no such setting.'),
        (['--config.loop.steps.x=3'], "config.loop.steps is a setting, not a section, and has no 'x'"),
        (['--config.loop[=3'], 'config.loop[: not a name'),
        (['--config=configs/dnd.py'], '--config=configs/dnd.py: no such file. Did you mean "dmd.py"?'),
        (['--config', 'configs'], '--config=configs: no such file. Pass a settings file, such as configs/dmd.py'),
        (['--config='], '--config=: no such file.'),
        (['--config=configs/dmd.py:tinny'], 'configs/dmd.py:tinny: no such preset. Did you mean "tiny"?'),
        (['--config={}/import.py'], "/import.py: does not load (ModuleNotFoundError: No module named 'nonsuch')"),
        (['--config={}/syntax.py'], '/syntax.py: does not load (SyntaxError: '),
        (['--config={}/open.py'], '/open.py: does not load (FileNotFoundError: '),
        (['--config={}/empty.py'], '/empty.py: has no function get_config that returns a ConfigDict'),
        (['--config={}/none.py'], '/none.py: has no function get_config that returns a ConfigDict'),
        (['--config={}/plain.py:tiny'], '/plain.py:tiny: does not load (TypeError: get_config() takes 0'),
        (['--config={}/plain.py', '--config.stps=2'], 'config.stps: no such setting. Did you mean "steps"?'),
    ],
)
def test_wrong_settings_are_refused(folder, words, message):
    with pytest.raises(InputError) as caught:
        check_command_line(['train.dmd', *(word.format(folder) for word in words)], 'configs/dmd.py')
    assert message in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'words',
    [
        [],
        ['--help'],
        [DMD, '--config.loop.steps=3', '--config.dmd.student_steps=(1, 1, 1)', '--noconfig.dmd.pairs', '--dry-run'],
        ['--config', 'configs/teacher.py', '--config.teacher.dtype', 'float32', '--topology=v5e:4x4'],
        ['--config={}/plain.py', '--config.steps=2'],
    ],
)
def test_right_settings_are_not(folder, words):
    check_command_line(['train.dmd', *(word.format(folder) for word in words)], 'configs/dmd.py')


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        (['train.dmd', DMD, '--config.lop.steps=3', '--dry-run'], 'config.lop: no such setting. Did you mean "loop"?'),
        # Without --config, the default file is read when the flag is defined.
        (['train.teacher', '--config.teachr.dtype=float32'], 'config.teachr: no such setting. Did you mean "teacher"?'),
        (['train.dmd', '--config=configs/nope.py'], '--config=configs/nope.py: no such file.'),
        (['train.aot', '--config=configs/nope.py', '--topology=v5e:4x4'], '--config=configs/nope.py: no such file.'),
        (['train.aot', DMD, '--config.dmd.zzz=1', '--topology=v5e:4x4'], 'config.dmd.zzz: no such setting.'),
    ],
)
def test_programs_say_so_in_one_line(line, message):
    done = subprocess.run(
        [sys.executable, '-m', *line], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f'error: settings: {message}')
    assert len(done.stderr.splitlines()) == 1
