"""`python -m export.device` with a fake adb: a folder replaces the phone, and every call is recorded."""

import hashlib
import json
import pathlib
import stat
import sys

import numpy as np
import pytest

from export.device import main

# Recorded answers of a phone; all other commands run in the folder.
STAND_IN = """#!{python}
import json, pathlib, shutil, subprocess, sys
root, answers = pathlib.Path({root!r}), json.loads(pathlib.Path({answers!r}).read_text())
serial, kind, *words = sys.argv[2:]
with open(root / 'calls.txt', 'a') as log:
    log.write(' '.join([kind, *words]) + '\\n')
inside = lambda path: str(root) + path
if kind == 'get-state':
    print(answers['state'])
elif kind == 'push':
    shutil.copy(words[0], inside(words[1]))
    if answers.get('damages') and words[1].endswith(answers['damages']):
        open(inside(words[1]), 'ab').write(b'x')
elif kind == 'pull':
    shutil.copy(inside(words[0]), words[1])
elif words[0] in answers:
    print(answers[words[0]])
else:
    sys.exit(subprocess.run(words[0].replace('/data/', inside('/data/')), shell=True).returncode)
"""

RUNNER = """#!{python}
import pathlib, sys
print('load denoiser_stage0 12.5')
for ms in ('3.0', '2.0', '9.0')[: int(sys.argv[4])]:
    print('run denoiser_stage0', ms)
print('canary denoiser_stage0', '41.70')
pathlib.Path('out').mkdir()
numbers = pathlib.Path('bundle/vectors/video.latents.bin').read_bytes()
pathlib.Path('out/latents.bin').write_bytes(numbers)
"""


def executable(path: pathlib.Path, text: str) -> str:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def setup(tmp_path):
    """Return a function that runs the command on a fake phone with given answers, and the folder of the phone."""
    phone, bundle, runtime = (tmp_path / name for name in ('phone', 'bundle', 'runtime'))
    for folder in (phone, bundle / 'vectors', bundle / 'portable', bundle / 'binaries', runtime):
        folder.mkdir(parents=True)
    latents = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype('<f4')
    content = {
        'vectors/video.latents.bin': latents.tobytes(),
        'portable/model.onnx': b'portable',
        'binaries/model.bin': b'binary',
        'binaries/wrapper.onnx': b'wrapper',
    }
    for name, data in content.items():
        (bundle / name).write_bytes(data)
    files = {name: {'bytes': len(data), 'sha256': hashlib.sha256(data).hexdigest()} for name, data in content.items()}
    binary = {
        'chipset': 'sm8750',
        'file': 'binaries/model.bin',
        'graphs': {'denoiser_stage0': {'wrapper': 'binaries/wrapper.onnx'}},
    }
    vectors = {'video': {'latents': {'file': 'vectors/video.latents.bin', 'shape': [2, 4, 4, 3]}}}
    manifest = {'files': files, 'binaries': [binary], 'chipsets': {'sm8750': {}}, 'vectors': vectors}
    (bundle / 'manifest.json').write_text(json.dumps(manifest))
    executable(runtime / 'neodragon_runner', RUNNER.format(python=sys.executable))

    def run(*arguments: str, **answers: str) -> int:
        recorded = {
            'state': 'device',
            'getprop ro.soc.model': 'SM8750',
            'getprop ro.product.model': 'Example 25',
            'cat /sys/class/thermal/thermal_zone*/temp 2>/dev/null || true': '31000 -273000 45500 0',
        }
        (tmp_path / 'answers.json').write_text(json.dumps(recorded | answers))
        texts = {'python': sys.executable, 'root': str(phone), 'answers': str(tmp_path / 'answers.json')}
        adb = executable(tmp_path / 'adb', STAND_IN.format(**texts))
        options = ['--serial', 'R5', '--runtime', str(runtime), '--adb', adb, *arguments]
        return main([str(bundle), *options])

    return run, tmp_path


def test_a_phone_is_measured_and_the_table_written(setup, capsys):
    run, folder = setup
    assert run('--runs', '3') == 0
    table = (folder / 'device-sm8750.md').read_text()
    assert '| denoiser_stage0 | 41.7 | 12 | 3 | 2.0 | 3.0 |' in table
    assert '300.0 dB against JAX' in table and '46 °C before, 46 °C after' in table
    measured = json.loads((folder / 'device-sm8750.json').read_text())
    assert measured['model'] == 'Example 25' and measured['graphs']['denoiser_stage0']['run_ms'] == [3, 2, 9]
    assert table in capsys.readouterr().out


def test_only_files_of_the_chipset_are_pushed(setup):
    run, folder = setup
    assert run() == 0
    calls = (folder / 'phone/calls.txt').read_text().splitlines()
    pushed = [call.split()[-1].rsplit('neodragon/', 1)[1] for call in calls if call.startswith('push')]
    assert 'bundle/binaries/model.bin' in pushed and 'bundle/portable/model.onnx' not in pushed
    last_push = max(index for index, call in enumerate(calls) if call.startswith('push'))
    assert 'sha256sum' in calls[last_push + 1]


@pytest.mark.parametrize(
    ('arguments', 'answers', 'message'),
    [
        ([], {'getprop ro.soc.model': 'SM8550'}, 'Export with --soc sm8550'),
        ([], {'state': 'unauthorized'}, 'accept USB debugging'),
        ([], {'damages': 'model.bin'}, 'binaries/model.bin arrived damaged'),
        (['--runs', '0'], {}, 'give at least 1'),
        (['--adb', '/nowhere/adb'], {}, 'Install platform-tools'),
        (['--runtime', '/nowhere'], {}, 'Build export/player/cpp'),
    ],
)
def test_errors_are_one_line(setup, capsys, arguments, answers, message):
    run, _ = setup
    assert run(*arguments, **answers) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


def test_a_damaged_bundle_is_not_pushed(setup, capsys):
    run, folder = setup
    (folder / 'bundle/binaries/model.bin').write_bytes(b'binarx')
    assert run() == 2
    assert 'model.bin' in capsys.readouterr().err and not (folder / 'phone/calls.txt').exists()


def test_a_runner_that_fails_is_one_line(setup, capsys):
    run, folder = setup
    executable(folder / 'runtime/neodragon_runner', f'#!{sys.executable}\nraise SystemExit("error: no HTP")\n')
    assert run() == 2
    assert 'no HTP' in capsys.readouterr().err
