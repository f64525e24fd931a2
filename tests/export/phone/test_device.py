"""`python -m export.device` with a fake adb: a folder replaces the phone, and every call is recorded."""

import hashlib
import json
import pathlib
import stat
import sys
from typing import Any

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

# Makes the recorded video, which a test puts beside it.
RUNNER = """#!{python}
import pathlib, sys
for graph in ('clip_l', 'denoiser_modulation', 'denoiser_stage0', 'video_decoder'):
    print('load', graph, '12.5')
    for ms in ('3.0', '2.0', '9.0')[: int(sys.argv[4])]:
        print('run', graph, ms)
    print('canary', graph, '41.70')
pathlib.Path('out').mkdir(exist_ok=True)
numbers = pathlib.Path('video').read_bytes()
pathlib.Path('out/latents.bin').write_bytes(numbers)
"""


LIBRARIES = ('libonnxruntime_providers_qnn.so', 'libQnnHtp.so', 'libQnnSystem.so')


def executable(path: pathlib.Path, text: str) -> str:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def _record(data: bytes) -> dict[str, Any]:
    return {'bytes': len(data), 'sha256': hashlib.sha256(data).hexdigest()}


def write_manifest(bundle: pathlib.Path, manifest: dict[str, Any]) -> None:
    content = json.dumps(manifest).encode()
    (bundle / 'manifest.json').write_bytes(content)
    (bundle / 'manifest.json.sha256').write_text(f'{hashlib.sha256(content).hexdigest()}  manifest.json\n')


@pytest.fixture
def setup(tmp_path):
    """Return a function that runs the command on a fake phone with given answers, and the folder of the phone."""
    phone, bundle, runtime = (tmp_path / name for name in ('phone', 'bundle', 'runtime'))
    for folder in (phone, bundle, runtime):
        folder.mkdir(parents=True)
    latents = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype('<f4')
    graphs = ('denoiser_modulation', 'denoiser_stage0', 'video_decoder', 'clip_l')
    content = {'vectors/video.latents.bin': latents.tobytes(), 'tokenizers/clip_l.json': b'tokens'}
    for graph in graphs:
        content |= {f'{folder}/{graph}': f'{folder} {graph}'.encode() for folder in ('vectors', 'portable', 'binaries')}
        content[f'binaries/{graph}.onnx'] = b'wrapper of ' + graph.encode()
    tables = ('sinusoid', 'rotary', 'padded', 'text', 'mask', 'pooled', 'clip_l.tokens')
    content |= {f'tables/{table}.bin': b'table ' + table.encode() for table in tables}
    for name, data in content.items():
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_bytes(data)
    stage = {
        'graph': 'denoiser_stage0',
        'first_unit_steps': [{'sinusoid': 'sinusoid'}],
        'steps': [{'sinusoid': 'sinusoid'}],
        'units': [None, {'rotary': {'table': 'rotary', 'padded': 'padded'}}],
    }
    binaries = [
        {'chipset': 'sm8750', 'file': f'binaries/{graph}', 'graphs': {graph: {'wrapper': f'binaries/{graph}.onnx'}}}
        for graph in graphs
    ]
    prompt_tables = {'text': 'text', 'mask': 'mask', 'pooled': 'pooled', 'first_frame': None}
    video = {
        'latents': {'file': 'vectors/video.latents.bin', 'shape': [2, 4, 4, 3]},
        'prompt_tables': prompt_tables,
        'minimum_db': 25.0,
    }
    manifest = {
        'files': {name: _record(data) for name, data in content.items()},
        'denoiser': {'stages': [stage]},
        'phases': [{'graphs': [name]} for name in sorted(graphs)],
        'graphs': {name: {'vector': {'file': f'vectors/{name}'}, 'portable': [f'portable/{name}']} for name in graphs},
        'tables': {name: {'file': f'tables/{name}.bin'} for name in tables},
        'binaries': binaries,
        'chipsets': {'sm8750': {}},
        'vectors': {'video': video},
    }
    write_manifest(bundle, manifest)
    executable(runtime / 'neodragon_runner', RUNNER.format(python=sys.executable))
    (runtime / 'video').write_bytes(latents.tobytes())
    for library in LIBRARIES:
        (runtime / library).write_bytes(b'library')

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
    assert 'recorded video: 300.0 dB' in table and '46 °C before, 46 °C after' in table
    measured = json.loads((folder / 'device-sm8750.json').read_text())
    assert measured['model'] == 'Example 25' and measured['graphs']['denoiser_stage0']['run_ms'] == [3, 2, 9]
    assert table in capsys.readouterr().out


def pushed(folder: pathlib.Path) -> list[str]:
    """Return the files that all calls so far have pushed, by their path in the folder on the phone."""
    calls = (folder / 'phone/calls.txt').read_text().splitlines()
    return [call.split()[-1].rsplit('local/tmp/neodragon/', 1)[1] for call in calls if call.startswith('push')]


def test_progress_is_told_before_the_end(setup, capsys):
    """Gigabytes are copied, and every graph runs ten times."""
    run, folder = setup
    assert run('--runs', '2') == 0
    lines = capsys.readouterr().out.splitlines()
    told = [line.split(',')[0] for line in lines if line.startswith('push ')]
    assert told == [
        'push runtime: files 5',
        'push bundle/binaries: files 8',
        'push bundle/tables: files 6',
        'push bundle/vectors: files 4',
        'push bundle: files 1',
    ]
    assert lines.index('run denoiser_stage0 3.0') > lines.index('load clip_l 12.5') > 0
    failing = 'print("run clip_l 3.0", flush=True)\nraise SystemExit("error: no HTP")'
    executable(folder / 'runtime/neodragon_runner', f'#!{sys.executable}\n{failing}\n')
    assert run() == 2
    shown = capsys.readouterr()
    assert 'run clip_l 3.0' in shown.out.splitlines() and 'error: no HTP' in shown.err


def on_phone(folder: pathlib.Path) -> set[str]:
    there = folder / 'phone/data/local/tmp/neodragon'
    return {path.relative_to(there).as_posix() for path in there.rglob('*') if path.is_file()}


OURS = ('clip_l', 'denoiser_modulation', 'denoiser_stage0', 'video_decoder')
ALWAYS = {f'bundle/vectors/{name}' for name in OURS} | {'neodragon_runner', 'bundle/manifest.json', *LIBRARIES}
TABLES = {f'bundle/tables/{name}.bin' for name in ('sinusoid', 'rotary', 'padded', 'text', 'mask', 'pooled')}


@pytest.mark.parametrize('chipset', ['sm8750', 'cpu'])
def test_only_files_that_the_runner_reads_are_pushed(setup, chipset):
    run, folder = setup
    assert run('--chipset', chipset) == 0
    binaries = {f'bundle/binaries/{name}{end}' for name in OURS for end in ('', '.onnx')}
    graphs = binaries if chipset == 'sm8750' else {f'bundle/portable/{name}' for name in OURS}
    assert set(pushed(folder)) == ALWAYS | TABLES | graphs | {'video'}


def test_a_second_run_pushes_what_has_changed_and_removes_the_rest(setup):
    run, folder = setup
    phone = folder / 'phone/data/local/tmp/neodragon'
    (folder / 'runtime/old.so').write_bytes(b'library of an older runtime')
    assert run() == 0
    before = len(pushed(folder))
    (phone / 'bundle/tables/text.bin').write_bytes(b'damaged')
    (phone / 'bundle/older.bin').write_bytes(b'of an older bundle')
    (folder / 'runtime/old.so').unlink()
    assert run() == 0
    assert pushed(folder)[before:] == ['bundle/tables/text.bin']
    assert not {'bundle/older.bin', 'old.so'} & on_phone(folder) and on_phone(folder) > ALWAYS | TABLES


def test_a_video_of_an_earlier_run_is_not_taken_for_this_one(setup, capsys):
    run, folder = setup
    assert run() == 0
    runner = RUNNER.replace("pathlib.Path('out/latents.bin')", '# ')
    executable(folder / 'runtime/neodragon_runner', runner.format(python=sys.executable))
    assert run() == 2
    assert 'latents.bin' in capsys.readouterr().err


def test_a_video_below_the_recorded_minimum_is_an_error(setup, capsys):
    run, folder = setup
    runner = RUNNER.replace('(numbers)', '(numbers[4:] + numbers[:4])')
    executable(folder / 'runtime/neodragon_runner', runner.format(python=sys.executable))
    assert run() == 2
    error = capsys.readouterr().err
    assert 'the recorded video comes out at' in error and 'not 25.0' in error and error.count('\n') == 1
    assert not (folder / 'device-sm8750.md').exists()


def test_a_manifest_that_differs_from_its_digest_is_refused(setup, capsys):
    run, folder = setup
    path = folder / 'bundle/manifest.json'
    path.write_text(path.read_text().replace('25.0', '15.0'))
    assert run() == 2
    assert 'differs from manifest.json.sha256' in capsys.readouterr().err and not (folder / 'phone/calls.txt').exists()


def test_graphs_that_the_runner_leaves_out_are_an_error(setup, capsys):
    run, folder = setup
    runner = RUNNER.replace(", 'video_decoder')", ')')
    executable(folder / 'runtime/neodragon_runner', runner.format(python=sys.executable))
    assert run() == 2
    assert 'no times of video_decoder' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('named', 'arguments'),
    [
        ('SM8750-AB', []),
        ('SM8750-AC', []),
        ('SM8750P', []),
        ('', ['--chipset', 'sm8750-ab']),
        ('', ['--chipset', '8 Elite']),
        ('', ['--chipset', '69:79']),
    ],
)
def test_a_chipset_is_known_by_all_its_names(setup, named, arguments):
    run, folder = setup
    assert run(*arguments, **{'getprop ro.soc.model': named}) == 0
    assert (folder / 'device-sm8750.md').is_file()


def test_a_chipset_without_a_model_number_is_known_by_its_name_in_the_bundle(setup):
    """`--soc 50:73` exports for a chipset that no table lists."""
    run, folder = setup
    path = folder / 'bundle/manifest.json'
    write_manifest(folder / 'bundle', json.loads(path.read_text().replace('sm8750', 'soc50-v73')))
    assert run('--chipset', 'soc50-v73') == 0 and run('--chipset', '50:73') == 0


@pytest.mark.parametrize(
    ('arguments', 'answers', 'message'),
    [
        (
            [],
            {'getprop ro.soc.model': 'SM8550-AC'},
            'the phone is SM8550-AC, the bundle is for sm8750. Export with --soc sm8550',
        ),
        (['--chipset', 'sm8650'], {}, '--chipset is sm8650, the bundle is for sm8750. Export with --soc sm8650'),
        ([], {'getprop ro.soc.model': 'MT6991'}, "chipset 'MT6991' is unknown"),
        ([], {'getprop ro.soc.model': ''}, 'the phone does not name its chipset'),
        ([], {'state': 'unauthorized'}, 'accept USB debugging'),
        ([], {'damages': 'vectors/video_decoder'}, 'bundle/vectors/video_decoder arrived damaged'),
        ([], {'damages': 'manifest.json'}, 'bundle/manifest.json arrived damaged'),
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


@pytest.mark.parametrize('library', LIBRARIES)
def test_a_runtime_without_the_plugin_is_refused_before_the_copies(setup, capsys, library):
    run, folder = setup
    (folder / 'runtime' / library).unlink()
    assert run() == 2
    assert f'has no {library}' in capsys.readouterr().err and not pushed(folder)
    assert run('--chipset', 'cpu') == 0


def test_a_damaged_bundle_is_not_pushed(setup, capsys):
    run, folder = setup
    (folder / 'bundle/binaries/video_decoder').write_bytes(b'binaries video_decodex')
    assert run() == 2
    assert 'binaries/video_decoder' in capsys.readouterr().err and not (folder / 'phone/calls.txt').exists()


def test_a_runner_that_fails_is_one_line(setup, capsys):
    run, folder = setup
    executable(folder / 'runtime/neodragon_runner', f'#!{sys.executable}\nraise SystemExit("error: no HTP")\n')
    assert run() == 2
    assert 'no HTP' in capsys.readouterr().err
