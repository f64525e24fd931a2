"""The player against JAX on the same seed, and its command line."""

import json
import re
import subprocess
import sys
import tomllib

import av
import numpy as np
import pytest
from neodragon_phone import __main__ as command
from neodragon_phone.backends import check_runtime, check_sdk
from neodragon_phone.bundle import Bundle
from neodragon_phone.errors import BundleError
from neodragon_phone.generation import Request, check_video, generate
from neodragon_phone.player import snr_db

from export.bundle.writer import MINIMUM_RUNTIME
from support.goldens import ROOT

# Both compute in float32, but in a different order.
EXACT_DB = 90.0
PROMPT = 'a small green square moves left on a black background'


def test_the_recorded_video_is_jaxs(player):
    """Compare float latents and byte frames, generated from the same prompt and seed."""
    entry = player.manifest['vectors']['video']
    video = generate(player, Request(entry['prompt'], entry['seed']))
    assert snr_db(player.bundle.recorded_latents(), video.latents) > EXACT_DB
    frames = np.fromfile(player.bundle.path(entry['frames']['file']), np.uint8).reshape(entry['frames']['shape'])
    assert np.abs(frames.astype(int) - video.frames).max() <= 1
    assert check_video(player) > EXACT_DB


def test_the_bundle_has_the_schedule_of_the_student(player):
    manifest = player.manifest
    assert manifest['checkpoint']['schedule'] == {'steps': [1, 2, 1], 'first_steps': [2, 1, 1], 'spacing': 'even'}
    levels = lambda steps: [(step['level'], step['next_level']) for step in steps]
    for stage, (steps, first_steps) in enumerate(((1, 2), (2, 1), (1, 1))):
        entry = manifest['denoiser']['stages'][stage]
        even = {1: [(1, 0)], 2: [(1, 0.5), (0.5, 0)]}
        assert levels(entry['steps']) == even[steps] and levels(entry['first_unit_steps']) == even[first_steps]


def test_seeds_and_prompts_matter(player):
    videos = [
        generate(player, Request(*request)).latents for request in ((PROMPT, 1), (PROMPT, 2), ('a red circle', 1))
    ]
    assert snr_db(videos[0], videos[1]) < 10 and snr_db(videos[0], videos[2]) < 30


def test_the_command_writes_a_video_and_a_report(bundle_folder, tmp_path, capsys):
    out, report = tmp_path / 'new' / 'video.mp4', tmp_path / 'report.json'
    arguments = [str(bundle_folder), '--prompt', PROMPT, '--seed', '3', '--out', str(out), '--report', str(report)]
    assert command.main(arguments) == 0
    with av.open(str(out)) as container:
        frames = [frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)]
    assert len(frames) == 9 and frames[0].shape == (64, 64, 3)
    graphs = json.loads(report.read_text())['graphs']
    assert graphs['denoiser_stage1']['canary_db'] > EXACT_DB and len(graphs['denoiser_stage1']['run_s']) == 3
    assert 'median ms' in capsys.readouterr().out


def test_a_picture_needs_its_encoder(bundle_folder, tmp_path, capsys):
    assert command.main([str(bundle_folder), '--prompt', PROMPT, '--image', str(tmp_path / 'picture.png')]) == 2
    assert 'video_encoder' in _one_line(capsys)


def test_the_canary_catches_another_result(player, monkeypatch):
    inputs, outputs = player.bundle.call('clip_l')
    monkeypatch.setattr(Bundle, 'call', lambda self, graph: (inputs, {'pooled': outputs['pooled'] * 1.5}))
    with pytest.raises(BundleError, match='clip_l: its recorded call gives'):
        player.check_all()


def test_an_older_runtime_is_one_line(player):
    with pytest.raises(BundleError, match=r'onnxruntime 1\.20\.1 is older than 1\.\d+\.\d+, the lowest that'):
        check_runtime(player.bundle, ['onnxruntime'], lambda package: '1.20.1')
    check_runtime(player.bundle, ['onnxruntime'], lambda package: '1.100.0')


def test_an_older_sdk_is_one_line(bundle_folder):
    bundle = Bundle.open(bundle_folder, 'sm8750')
    needed = bundle.manifest['binaries'][0]['qnn_sdk']
    with pytest.raises(BundleError, match=rf'QNN SDK 2\.9\.0 is older than binaries/.*\.bin, compiled with {needed}'):
        check_sdk(bundle, '2.9.0')
    check_sdk(bundle, '2.100.0')
    check_sdk(bundle, '.'.join(needed.removeprefix('v').split('.')[:3]))
    for binary in bundle.manifest['binaries']:
        del binary['qnn_sdk']
    check_sdk(bundle, '2.9.0')


def test_the_command_refuses_an_older_runtime_in_one_line(bundle_folder, monkeypatch, capsys):
    monkeypatch.setattr('importlib.metadata.version', lambda package: '1.20.1')
    assert command.main([str(bundle_folder), '--prompt', PROMPT]) == 2
    assert 'onnxruntime 1.20.1 is older than 1.' in _one_line(capsys)


def test_a_wrong_chipset_is_one_line(bundle_folder, capsys):
    assert command.main([str(bundle_folder), '--prompt', PROMPT, '--backend', 'htp', '--chipset', 'sm8550']) == 2
    assert "no binaries for 'sm8550', only for sm8750" in _one_line(capsys)


def test_the_chipset_of_a_machine_without_one_must_be_named(bundle_folder, capsys, monkeypatch):
    monkeypatch.setenv('PATH', '')
    assert command.main([str(bundle_folder), '--prompt', PROMPT, '--backend', 'htp']) == 2
    assert '--chipset' in _one_line(capsys)


def test_a_folder_that_is_no_bundle_is_one_line(tmp_path, capsys):
    assert command.main([str(tmp_path), '--prompt', PROMPT]) == 2
    assert 'manifest.json' in _one_line(capsys)


def test_the_player_needs_nothing_of_the_library():
    modules = [f'neodragon_phone.{path.stem}' for path in (ROOT / 'export/player/neodragon_phone').glob('[a-z]*.py')]
    foreign = ('jax', 'flax', 'neodragon_jax', 'export', 'onnx', 'transformers', 'scipy')
    code = f'import sys, {", ".join(modules)}\nprint([name for name in {foreign!r} if name in sys.modules])'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                         cwd=ROOT / 'export/player')  # fmt: skip
    assert run.stdout.strip() == '[]'


def test_the_player_requires_what_it_imports_as_the_library_does():
    """Another version of Pillow or ftfy than in JAX could give another first frame or other tokens.

    ONNX Runtime has a lowest version of its own, that of every bundle: recorded calls judge what it computes.
    """
    imported = set()
    for path in (ROOT / 'export/player/neodragon_phone').glob('*.py'):
        found = re.findall(r'(?m)^ *(?:import|from) (\w+)', path.read_text())
        imported |= {'pillow' if name == 'PIL' else name for name in found} - sys.stdlib_module_names
    project = tomllib.loads((ROOT / 'export/player/pyproject.toml').read_text())['project']
    required = dict(line.split('>=') for line in project['dependencies'])
    assert imported - {'neodragon_phone', 'onnxruntime_qnn'} == set(required)
    library = re.findall(r'(?m)^    (\w+)>=([\d.]+)', (ROOT / 'setup.cfg').read_text())
    least = {name: version for name, version in library if name in required}
    least['onnxruntime'] = MINIMUM_RUNTIME['onnxruntime']
    assert least.items() <= required.items()


def _one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
    return error


def test_the_page_lists_the_files_of_an_app(bundle_folder):
    """Its lines of Python name the files of one chipset, without portable graphs; they are enough for the player."""
    page = (ROOT / 'docs' / 'bundle.md').read_text()
    (code,) = re.findall(r'```python\n(.*?)```', page, flags=re.S)
    names: dict[str, list[str]] = {}
    exec(code.replace('OUT/bundle', str(bundle_folder)), names)
    everything = {str(path.relative_to(bundle_folder)) for path in bundle_folder.rglob('*') if path.is_file()}
    left = everything - set(names['files'])
    assert left == {'README.md', 'LICENSE', *(name for name in everything if name.startswith('portable/'))}


def test_help_sends_apps_to_the_code_for_them(capsys):
    """A phone runs no Python."""
    with pytest.raises(SystemExit):
        command.parse_options(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert 'An Android app does not run Python' in text and 'on a phone' not in text
