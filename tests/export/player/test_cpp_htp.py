"""The C++ runner with context binaries: versions and libraries are checked first, and binaries are shared by phase.

The x86 simulator loads binaries of one graph only. The order in which graphs of one binary are opened is therefore
checked with a replacement of ONNX Runtime that prints it.
"""

import json
import os
import pathlib
import shutil
import subprocess

import numpy as np
import onnxruntime
import onnxruntime_qnn
import pytest
from neodragon_phone.player import snr_db

from export.__main__ import main
from support.goldens import ROOT

LIBRARIES = pathlib.Path(onnxruntime_qnn.get_library_path()).parent
QNN = os.environ | {'LD_LIBRARY_PATH': str(LIBRARIES)}
STAGES = ['denoiser_stage0', 'denoiser_stage1', 'denoiser_stage2']
# FP16 against float32, as the simulator computes it; 48.9 dB was reached.
FP16_DB = 40.0


@pytest.fixture
def bundle(bundle_folder, tmp_path) -> pathlib.Path:
    """A bundle whose manifest a test may change."""
    return pathlib.Path(shutil.copytree(bundle_folder, tmp_path / 'bundle'))


@pytest.fixture(scope='module')
def replacement(tmp_path_factory) -> pathlib.Path:
    """The library that takes the place of ONNX Runtime."""
    library = tmp_path_factory.mktemp('fake') / 'libfake.so'
    source = pathlib.Path(__file__).with_name('fake_onnxruntime.cpp')
    include = ROOT / 'export' / 'player' / 'cpp' / 'src'
    subprocess.run(['g++', '-std=c++17', '-shared', '-fPIC', '-I', include, source, '-o', library], check=True)
    return library


def change(bundle: pathlib.Path, edit) -> None:
    path = bundle / 'manifest.json'
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def fake(library: pathlib.Path, bundle: pathlib.Path, folder: pathlib.Path) -> dict[str, str]:
    """Return the environment of a run with the replacement, which gives the recorded outputs of a bundle."""
    graphs = json.loads((bundle / 'manifest.json').read_text())['graphs']
    lines = [
        f'{name} {output} {4 * int(np.prod(tensor["shape"]))}\n'
        for name, graph in graphs.items()
        for output, tensor in graph['outputs'].items()
    ]
    (folder / 'sizes.txt').write_text(''.join(lines))
    files = {'FAKE_SIZES': str(folder / 'sizes.txt'), 'FAKE_VECTORS': str(bundle / 'vectors')}
    return QNN | files | {'LD_PRELOAD': str(library)}


def test_the_graphs_of_a_binary_are_opened_and_closed_together(runner, bundle_folder, tmp_path, replacement):
    """Sharing is process-wide: a stage that is closed alone takes the memory of the others with it."""
    command = [runner, bundle_folder, tmp_path / 'out', 'sm8750']
    environment = fake(replacement, bundle_folder, tmp_path)
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    share, stop = 'ep.share_ep_contexts', 'ep.stop_share_ep_contexts'
    opened = [line.split()[1:] for line in run.stdout.splitlines() if line.startswith('open ')]
    text = ['clip_l', 'clip_g', 'dt5', 'context_adapter']
    denoising = [[STAGES[0], share], [STAGES[1], share], [STAGES[2], share, stop]]
    video = [['denoiser_modulation'], *denoising, ['video_decoder']]
    assert opened == [*([name] for name in text), *video, *video], 'the recorded calls, then the video'
    alive: set[str] = set()
    for word, name, *_ in (
        line.split() for line in run.stdout.splitlines() if line.startswith(('open', 'close', 'can'))
    ):
        (phase,) = [phase for phase in (set(text), set(STAGES), {name}) if name in phase][:1]
        if word == 'open':
            alive.add(name)
        assert alive <= phase, 'no graph of another phase'
        assert word == 'open' or name in alive
        if word == 'canary':
            assert alive == phase, 'all graphs of the phase'
        if word == 'close':
            alive.remove(name)
    assert not alive


def test_a_chipset_is_known_by_its_name_with_a_grade(runner, bundle_folder, tmp_path, replacement):
    """As Android names it."""
    environment = fake(replacement, bundle_folder, tmp_path)
    lines = [
        subprocess.run([runner, bundle_folder, tmp_path, name], capture_output=True, text=True, env=environment)
        for name in ('sm8750', 'SM8750-AB')
    ]
    opened = [[line for line in run.stdout.splitlines() if line.startswith('open ')] for run in lines]
    assert lines[1].returncode == 0 and opened[0] == opened[1] != [], lines[1].stderr


def test_a_machine_without_htp_is_one_line(refused, bundle_folder, tmp_path, replacement):
    environment = fake(replacement, bundle_folder, tmp_path) | {'FAKE_NO_HTP': '1'}
    assert 'finds no HTP on this machine' in refused(bundle_folder, tmp_path / 'out', 'sm8750', env=environment)


def test_an_older_runtime_is_named_with_the_one_that_is_needed(refused, bundle, tmp_path):
    change(bundle, lambda manifest: manifest['minimum_runtime'].update(onnxruntime='1.100.2'))
    for place in ('cpu', 'sm8750'):
        message = refused(bundle, tmp_path / 'out', place, env=QNN)
        assert 'is older than 1.100.2, the lowest that plays the bundle' in message
        assert f'ONNX Runtime {onnxruntime.__version__} ' in message


def test_an_older_sdk_is_named_with_the_one_that_is_needed(refused, runner, bundle, tmp_path):
    made = json.loads((bundle / 'manifest.json').read_text())['binaries'][0]['qnn_sdk']

    def edit(manifest):
        manifest['tool_versions']['onnxruntime-qnn'] = '2.100.0'
        for binary in manifest['binaries']:
            binary['qnn_sdk'] = 'v2.100.0.1'

    change(bundle, edit)
    message = refused(bundle, tmp_path / 'out', 'sm8750', env=QNN)
    assert f'QNN SDK {made} is older than v2.100.0.1, which compiled binaries/' in message
    assert 'use the libraries of onnxruntime-qnn 2.100.0 or newer' in message
    subprocess.run([runner, bundle, tmp_path / 'out', 'cpu'], check=True, capture_output=True)


def test_a_bundle_that_does_not_name_its_sdk_is_refused_on_the_htp(refused, bundle, tmp_path):
    change(bundle, lambda manifest: [binary.pop('qnn_sdk') for binary in manifest['binaries']])
    message = refused(bundle, tmp_path / 'out', 'sm8750', env=QNN)
    assert 'does not tell the QNN SDK that made' in message and 'export the bundle again, or run with cpu' in message


@pytest.mark.parametrize('missing', ['libQnnHtp.so', 'libonnxruntime_providers_qnn.so'])
def test_a_missing_library_of_the_plugin_is_one_line(refused, bundle_folder, tmp_path, missing):
    there = tmp_path / LIBRARIES.name
    there.mkdir()
    for library in LIBRARIES.glob('*.so'):
        if library.name != missing:
            (there / library.name).symlink_to(library)
    # They look for the libraries of the compiler beside their folder.
    (tmp_path / f'{LIBRARIES.name}.libs').symlink_to(LIBRARIES.with_name(f'{LIBRARIES.name}.libs'))
    environment = os.environ | {'LD_LIBRARY_PATH': str(there)}
    message = refused(bundle_folder, tmp_path / 'out', 'sm8750', env=environment)
    assert f'{missing}: cannot be loaded' in message and 'put the libraries of onnxruntime-qnn' in message


@pytest.mark.long
@pytest.mark.qnn
def test_context_binaries_run_on_the_simulator(runner, bundle_folder, bundle_arguments, tmp_path):
    """The same program as on a phone: the plugin is registered, and the binaries are loaded by ONNX Runtime."""
    out = pathlib.Path(shutil.copytree(bundle_folder.parent, tmp_path / 'export'))
    assert main([*bundle_arguments, '--separate-contexts', '--out', str(out)]) == 0
    command = [runner, out / 'bundle', tmp_path / 'out', 'sm8750']
    run = subprocess.run(command, capture_output=True, text=True, env=QNN)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count('canary ') == 9
    entry = json.loads((out / 'bundle' / 'manifest.json').read_text())['vectors']['video']['latents']
    expected = np.fromfile(out / 'bundle' / entry['file'], '<f4')
    assert snr_db(expected, np.fromfile(tmp_path / 'out' / 'latents.bin', '<f4')) > FP16_DB
