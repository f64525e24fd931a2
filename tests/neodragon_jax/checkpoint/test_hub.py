"""Tests of checkpoints by hub name, against a loopback server that implements the hub's protocol."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from neodragon_jax import upload
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import folders, hub, shipped
from neodragon_jax.checkpoint.components import component_folder
from neodragon_jax.generation import defaults
from neodragon_jax.generation.student import find_student
from support.goldens import ROOT, TINY_CHECKPOINT
from support.hub_server import COMMIT, Hub, serve

NAME = 'someone/tiny'
FIND = 'import sys; from neodragon_jax.checkpoint import shipped; print(shipped.find({!r}, {!r}))'


@pytest.fixture
def served():
    with serve(TINY_CHECKPOINT, NAME) as server:
        yield server


def run(server: Hub, home: pathlib.Path, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the hub's library configured for a given server and a separate cache."""
    own = {'HF_ENDPOINT': server.endpoint, 'HF_HOME': str(home), 'HF_HUB_OFFLINE': '0', 'HF_HUB_DISABLE_XET': '1'}
    own |= {'NO_PROXY': '127.0.0.1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'HF_HUB_DOWNLOAD_TIMEOUT': '2'}
    environment = os.environ | own | variables
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=ROOT, env=environment)


def find(server: Hub, home: pathlib.Path, name: str, needed: object = None, **variables: str):
    return run(server, home, '-c', FIND.format(name, needed), **variables)


@pytest.mark.parametrize(
    ('text', 'name'),
    [
        ('org/name', hub.HubName('org/name', None)),
        ('hf://org/name', hub.HubName('org/name', None)),
        ('HF://org/na.me@v1', hub.HubName('org/na.me', 'v1')),
        ('org/name@0123abc', hub.HubName('org/name', '0123abc')),
        ('name', None),
        ('a/b/c', None),
        ('hf://org', None),
        ('/org/name', None),
        ('org/na me', None),
    ],
)
def test_names(text, name):
    assert hub.parse(text) == name


def test_only_the_folders_of_a_mode_are_needed():
    assert 'ssd_1b_unet' in hub.needed_folders('hybrid', 'model')
    few, many = hub.needed_folders('hybrid', 'denoiser'), hub.needed_folders('monolithic', 'denoiser')
    assert not any(folder.startswith('ssd_1b') for folder in (*few, *many))
    assert 'diffusion_transformer_320p' in few and 'diffusion_transformer_320p' not in many
    for mode, first_frame in (('hybrid', 'model'), ('monolithic', 'denoiser')):
        present = {path.name for path in TINY_CHECKPOINT.iterdir()}
        assert set(hub.needed_folders(mode, first_frame)) <= present | {'safety_checker', 'feature_extractor'}


def test_two_interruptions_and_no_file_twice(served, tmp_path):
    """The download ends twice in the middle of a file; no complete file is fetched again."""
    needed = hub.needed_folders('monolithic', 'denoiser')
    for _ in range(2):
        served.files_left = 5
        got = find(served, tmp_path, f'hf://{NAME}@v1', needed)
        assert got.returncode == 1 and 'the hub cannot be reached' in got.stderr, got.stderr
    served.files_left = None
    got = find(served, tmp_path, f'hf://{NAME}@v1', needed)
    assert got.returncode == 0, got.stderr
    root = pathlib.Path(got.stdout.strip())
    assert root.name == COMMIT, 'the commit is recorded'
    wanted = {name for name in served.files() if name.split('/')[0] in needed or name == 'generation.json'}
    assert {path.relative_to(root).as_posix() for path in root.rglob('*') if path.is_file()} == wanted
    # The cache stores files of equal content once; two of the tokenizers share files.
    content = lambda names: {(TINY_CHECKPOINT / name).read_bytes() for name in names}
    assert content(served.sent) == content(wanted) and set(served.sent.values()) == {1}
    for name in wanted:
        assert (root / name).read_bytes() == (TINY_CHECKPOINT / name).read_bytes()
    # In offline mode, later runs send no request to the hub.
    offline = find(served, tmp_path, f'{NAME}@v1', needed, HF_HUB_OFFLINE='1')
    assert offline.returncode == 0 and pathlib.Path(offline.stdout.strip()) == root, offline.stderr


@pytest.mark.parametrize('scheme', ['hf://', ''])
def test_programs_take_names_and_fetch_the_components_they_read(served, tmp_path, scheme):
    code = (
        'from neodragon_jax.checkpoint.components import component_folder, load_module\n'
        'from neodragon_jax.generation import defaults, tokens\n'
        'import pathlib\n'
        f'name = pathlib.Path("{scheme}{NAME}")\n'
        'tokens.Tokenizers.load(name), defaults.read(name)\n'
        'print(type(load_module(component_folder(name, "context_adapter"))).__name__)'
    )
    got = run(served, tmp_path, '-c', code)
    assert got.returncode == 0 and got.stdout.strip() == 'ContextAdapter', got.stderr
    assert {name.split('/')[0] for name in served.sent} <= {*folders.TOKENIZERS, 'context_adapter', 'generation.json'}


def test_programs_take_the_names_of_shipped_checkpoints():
    root = shipped.FOLDER / shipped.DEFAULT
    assert component_folder(shipped.DEFAULT, folders.TEACHER) == root / folders.TEACHER
    assert component_folder(pathlib.Path(shipped.DEFAULT), folders.TEACHER) == root / folders.TEACHER
    assert defaults.read(shipped.DEFAULT) == defaults.read(root) != defaults.RELEASED
    with pytest.raises(InputError, match=rf'no such checkpoint folder. Did you mean "{shipped.DEFAULT}"'):
        component_folder(shipped.DEFAULT[:-1], folders.TEACHER)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('hf://someone/tiny@v2', 'no such revision'),
        ('hf://someone/else', 'no such repository on the hub'),
        ('hf://someone', 'not a name of the hub'),
        ('someone/else', 'no such checkpoint folder'),
    ],
)
def test_unknown_names_are_one_line(served, tmp_path, name, message):
    got = run(served, tmp_path, '-m', 'neodragon_jax', '--prompt', 'x', '--out', str(tmp_path), '--checkpoint', name)
    assert got.returncode == 2 and message in got.stderr and got.stderr.count('\n') == 1, got.stderr


def test_messages_name_the_option_that_was_given(served, tmp_path):
    argv = ['-m', 'train.benchmark', '--out', str(tmp_path / 'out'), '--start', 'hf://someone/else']
    got = run(served, tmp_path, *argv)
    assert got.returncode == 2 and '--start hf://someone/else: no such repository' in got.stderr, got.stderr
    got = run(served, tmp_path, '-m', 'neodragon_jax', '--prompt', 'x', '--out', str(tmp_path), '--student', 'hf://a/b')
    assert got.returncode == 2 and '--student hf://a/b: no such repository' in got.stderr, got.stderr
    with pytest.raises(InputError, match='--start hf://someone: not a name of the hub'):
        shipped.find('hf://someone', option='--start')
    with pytest.raises(InputError, match='--student hf://someone: not a name of the hub'):
        find_student('hf://someone', 'hybrid')


def test_gated_and_offline_are_one_line(served, tmp_path):
    argv = ['-m', 'neodragon_jax', '--prompt', 'x', '--out', str(tmp_path), '--checkpoint', f'hf://{NAME}']
    served.gated = True
    gated = run(served, tmp_path, *argv)
    assert gated.returncode == 2 and 'Accept its terms' in gated.stderr and gated.stderr.count('\n') == 1, gated.stderr
    offline = run(served, tmp_path, *argv, HF_HUB_OFFLINE='1')
    assert offline.returncode == 2 and 'cannot be reached' in offline.stderr, offline.stderr


def test_a_video_by_name(served, tmp_path):
    out = tmp_path / 'out'
    argv = ['--mode', 'monolithic', '--frames', '9', '--height', '64', '--width', '64', '--steps', '1', '1', '1']
    got = run(
        served, tmp_path, '-m', 'neodragon_jax', *argv, '--prompt', 'x', '--out', str(out), '--checkpoint', NAME
    )  # fmt: skip
    assert got.returncode == 0, got.stderr
    assert (out / 'x-0.mp4').is_file()
    assert not any(name.startswith(('ssd_1b', 'diffusion_transformer_320p/')) for name in served.requested)


@pytest.fixture
def student(tmp_path) -> pathlib.Path:
    """The result of a distillation, and the metrics of its run."""
    folder = tmp_path / 'run' / 'result'
    for name in (folders.STUDENT, folders.STUDENT_ADAPTER):
        shutil.copytree(TINY_CHECKPOINT / name, folder / name)
    record = {'teacher': 'abc123', 'iterations': 30, 'frames': 49, 'averaged': True, 'checkpoint': '/a/machine'}
    record['samples'] = {'steps': [10, 10, 10], 'guidance': 5.0, 'prompt_modifier': 'a | b'}
    (folder / 'student.json').write_text(json.dumps(record))
    (folder.parent / 'metrics.jsonl').write_text('{"step": 10}\n{"step": 30, "fake_mse": 0.125}\n{"step"')
    return folder


def test_card_of_a_student(student, capsys):
    assert upload.main([str(student), '--to', 'org/student', '--license', 'apache-2.0', '--dry-run']) == 0
    card = capsys.readouterr().out
    assert card.startswith('---\nlibrary_name: neodragon_jax') and 'license: apache-2.0' in card
    assert '--student hf://org/student' in card and '/a/machine' not in card
    for row in ('teacher | abc123', 'iterations | 30', 'steps | [10, 10, 10]', 'guidance | 5', 'fake_mse | 0.125'):
        assert f'| {row} |' in card
    assert r'a \| b' in card


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--to', 'student'], 'not a repository of the hub; write ORG/NAME'),
        (['--to', 'a/b@main'], 'not a repository of the hub'),
    ],
)
def test_uploads_to_wrong_names_are_refused(student, capsys, argv, message):
    assert upload.main([str(student), *argv]) == 2
    assert message in capsys.readouterr().err


def test_uploads_of_other_folders_are_refused(student, capsys):
    (student / 'student.json').unlink()
    assert upload.main([str(student), '--to', 'a/b']) == 2
    assert 'train.dmd writes it' in capsys.readouterr().err
    assert upload.main([str(student.parent), '--to', 'a/b']) == 2
    assert 'no diffusion_transformer_320p in it' in capsys.readouterr().err


def test_a_student_in_a_bucket(student, bucket, bucket_store, tmp_path, capsys):
    """A run on a pod leaves it there; its card needs no copy of the weights."""
    bucket_store.put(str(student.parent), f'{bucket}/run', recursive=True)
    where = f'{bucket}/run/{student.name}'
    assert upload.main([where, '--to', 'org/student', '--dry-run']) == 0
    assert '| fake_mse | 0.125 |' in capsys.readouterr().out
    assert not list((tmp_path / 'cache').rglob('*.safetensors'))
    with serve(tmp_path / 'served', 'org/student') as server:
        done = run(
            server, tmp_path / 'home', '-m', 'neodragon_jax.upload', where, '--to', 'org/student', HF_TOKEN='hf_test'
        )
        assert done.returncode == 0, done.stderr
        served = set(server.files())
    assert {f'{folders.STUDENT}/{path.name}' for path in (student / folders.STUDENT).iterdir()} < served
    assert upload.main([f'{bucket}/run', '--to', 'org/student', '--dry-run']) == 2
    assert f'{bucket}/run: no diffusion_transformer_320p in it' in capsys.readouterr().err


def test_upload_and_use_by_name(student, tmp_path):
    with serve(tmp_path / 'served', 'org/student') as server:
        argv = ['-m', 'neodragon_jax.upload', str(student), '--to', 'org/student']
        done = run(server, tmp_path / 'home', *argv, HF_TOKEN='hf_test')
        assert done.returncode == 0 and f'--student hf://org/student@{COMMIT}' in done.stdout, done.stderr
        assert {'README.md', 'student.json'} < set(server.files())
        fetched = find(server, tmp_path / 'home', f'hf://org/student@{COMMIT}', (folders.STUDENT,))
        root = pathlib.Path(fetched.stdout.strip())
        for path in (student / folders.STUDENT).iterdir():
            assert (root / folders.STUDENT / path.name).read_bytes() == path.read_bytes()
        server.gated = True
        refused = run(server, tmp_path / 'home', *argv, HF_TOKEN='hf_test')
        assert refused.returncode == 2 and 'hf auth login' in refused.stderr, refused.stderr
