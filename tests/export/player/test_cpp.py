"""The C++ runner: built by the test, run on the CPU provider, compared with the player on the same encoded prompt."""

import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
import subprocess

import numpy as np
import onnx
import pytest
from neodragon_phone import noise
from neodragon_phone.backends import Session, open_backend
from neodragon_phone.bundle import Bundle
from neodragon_phone.chipsets import find_chipset
from neodragon_phone.denoiser import generate_latents
from neodragon_phone.frames import _enlarge, decode
from neodragon_phone.player import Sessions, snr_db
from neodragon_phone.text import Prompt
from onnx import helper, numpy_helper

from export.phone.copies import CPU, runner_files, runner_graphs
from export.phone.session import read_output
from export.qnn.chipsets import TARGETS
from support.goldens import ROOT

# Both run the same library; the host's arithmetic differs by rounding.
EXACT_DB = 90.0
SOURCE = ROOT / 'export' / 'player' / 'cpp'

NOISE_PROGRAM = """
#include <cstdio>
#include "noise.h"
int main() {
  const auto numbers = neodragon::normals(18446744073709551615ull, neodragon::Purpose::kBlock, 3, 2, 10001);
  std::fwrite(numbers.data(), sizeof(float), numbers.size(), stdout);
}
"""

SEED_PROGRAM = """
#include <cinttypes>
#include <cstdio>
#include <exception>
#include "json.h"
int main(int, char** argv) {
  try {
    std::printf("%" PRIu64, neodragon::Json::parse(argv[1])["seed"].whole64());
  } catch (const std::exception& error) {
    std::printf("%s", error.what());
  }
}
"""


CHIPSET_PROGRAM = """
#include <cstdio>
#include "chipsets.h"
int main(int count, char** arguments) {
  const neodragon::Json chipsets = neodragon::Json::parse(arguments[1]);
  for (int i = 2; i < count; ++i) std::printf("%s\\n", neodragon::find_chipset(chipsets, arguments[i]).c_str());
}
"""


def _program(folder: pathlib.Path, text: str, *sources: str) -> pathlib.Path:
    """Compile a program with some files of the runner."""
    (folder / 'main.cpp').write_text(text)
    command = ['g++', '-std=c++17', '-O2', '-ffp-contract=off', '-I', SOURCE / 'src', folder / 'main.cpp']
    subprocess.run([*command, *(SOURCE / 'src' / name for name in sources), '-o', folder / 'program'], check=True)
    return folder / 'program'


def test_noise_is_the_players_bit_for_bit(tmp_path):
    program = _program(tmp_path, NOISE_PROGRAM, 'noise.cpp')
    numbers = subprocess.run([program], check=True, capture_output=True).stdout
    expected = noise.normals(2**64 - 1, noise.BLOCK, 3, 2, (10001,))
    np.testing.assert_array_equal(np.frombuffer(numbers, '<f4'), expected)


def test_all_bits_of_a_seed_are_read(tmp_path):
    program = _program(tmp_path, SEED_PROGRAM, 'json.cpp')
    read = lambda text: subprocess.check_output([program, f'{{"seed": {text}}}'], text=True)
    for seed in (0, 7, 2**53 + 1, 2**63 + 1, 2**64 - 1):
        assert read(str(seed)) == str(seed)
    assert read(str(2**64)) == 'manifest.json: a whole number is too large'
    for text in ('-1', '1.5', '1e3', 'null', '"1"'):
        assert read(text) == 'manifest.json: a value is not a whole number'


def test_chipsets_have_the_names_that_the_player_knows(tmp_path):
    chipsets = {name: dataclasses.asdict(target) for name, target in TARGETS.items()}
    models = [model for target in TARGETS.values() for model in (target.chipset, *target.aliases)]
    known = [model + grade for model in models for grade in ('', '-AB', '-AC', '-3-AB', '-1-AA', 'P', ' p ')]
    names = [*known, *(name.upper() for name in known), 'x1e-80-100', 'sm_8750 - ab', '\tSM8750-AB\n']
    names += ['', 'sm0000', 'SM8750-AZ', '-ab', 'AB', 'sm8750-0-ab', 'p', '8750', 'sm8750-ab-ab', 'cpu', 'a\nsm8750-ab']
    program = _program(tmp_path, CHIPSET_PROGRAM, 'chipsets.cpp', 'json.cpp')
    found = subprocess.check_output([program, json.dumps(chipsets), *names], text=True).split('\n')[:-1]
    assert dict(zip(names, found, strict=True)) == {name: find_chipset(chipsets, name) or '' for name in names}


def test_latents_and_frames_are_the_players(runner, player, bundle_folder, tmp_path):
    run = subprocess.run([str(runner), str(bundle_folder), str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert set(read_output(run.stdout)) == set(player.manifest['graphs'])
    entry = player.manifest['vectors']['video']
    arrays = [np.asarray(player.bundle.table(entry['prompt_tables'][name])) for name in Prompt._fields]
    latents = generate_latents(player, [Prompt(*arrays)], entry['seed'], None)
    got = np.fromfile(tmp_path / 'latents.bin', '<f4').reshape(latents.shape)
    assert snr_db(latents, got) > EXACT_DB
    frames = decode(player, latents)
    assert np.abs(frames.astype(int).reshape(-1) - np.fromfile(tmp_path / 'frames.bin', np.uint8)).max() <= 1


def test_the_device_command_copies_all_that_the_runner_reads(runner, bundle_folder, tmp_path):
    manifest = json.loads((bundle_folder / 'manifest.json').read_text())
    names = [*runner_files(manifest, CPU), 'manifest.json']
    for name in names:
        (tmp_path / 'bundle' / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle_folder / name, tmp_path / 'bundle' / name)
    assert len(names) < len(manifest['files'])
    run = subprocess.run([runner, tmp_path / 'bundle', tmp_path / 'out'], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert read_output(run.stdout).keys() == set(runner_graphs(manifest))


def test_frames_have_the_size_of_super_resolution(runner, bundle_folder, tmp_path):
    """The graph takes a frame and gives it twice as large and darker."""
    bundle = pathlib.Path(shutil.copytree(bundle_folder, tmp_path / 'bundle'))
    small = _frames(runner, bundle, tmp_path / 'small')
    _add_super_resolution(bundle)
    (session,) = open_backend('cpu', Bundle.open(bundle), None).open(['super_resolution']).values()
    inputs = json.loads((bundle / 'manifest.json').read_text())['graphs']['super_resolution']['inputs']
    graph = Session('super_resolution', session, inputs, ['enlarged'])
    expected = _enlarge(Sessions(super_resolution=graph), small)
    np.testing.assert_array_equal(_frames(runner, bundle, tmp_path / 'large').reshape(expected.shape), expected)


def test_a_graph_that_the_video_does_not_run_is_checked(refused, player, bundle_folder, tmp_path):
    """A text encoder: a wrong one gives the video of another prompt."""
    file = player.manifest['graphs']['clip_l']['vector']['file']
    bundle = _changed(bundle_folder, tmp_path, file, -np.fromfile(bundle_folder / file, '<f4'))
    assert 'clip_l: computes another result than recorded' in refused(bundle, tmp_path)


@pytest.mark.parametrize('key', ['guidance', 'first_guidance'])
def test_guidance_is_refused_before_the_work(runner, bundle_folder, tmp_path, key):
    bundle = pathlib.Path(shutil.copytree(bundle_folder, tmp_path / 'bundle'))
    manifest = json.loads((bundle / 'manifest.json').read_text())
    manifest['denoiser'][key] = 2.0
    (bundle / 'manifest.json').write_text(json.dumps(manifest))
    run = subprocess.run([runner, bundle, tmp_path / 'out'], capture_output=True, text=True)
    assert run.returncode == 2 and 'this bundle uses guidance' in run.stderr and not run.stdout


def test_an_error_follows_the_lines_before_it(runner, player, bundle_folder, tmp_path):
    """adb gives both in one stream, and a message shows its end."""
    file = player.manifest['graphs']['video_decoder']['vector']['file']
    bundle = _changed(bundle_folder, tmp_path, file, -np.fromfile(bundle_folder / file, '<f4'))
    streams = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT}
    lines = subprocess.run([runner, bundle, tmp_path / 'out'], text=True, **streams).stdout.splitlines()
    assert lines[0].startswith('load clip_l ') and lines[-1].startswith('error: video_decoder')


@pytest.mark.parametrize('side', ['inputs', 'outputs'])
def test_numbers_that_are_not_finite_fail_the_canary(refused, player, bundle_folder, tmp_path, side):
    """In the inputs they give such a result; in the outputs they are the reference."""
    graph = player.manifest['graphs']['video_decoder']
    file, first = graph['vector']['file'], sum(math.prod(entry['shape']) for entry in graph['inputs'].values())
    numbers = np.fromfile(bundle_folder / file, '<f4')
    numbers[first - 1 if side == 'inputs' else first :] = np.nan
    bundle = _changed(bundle_folder, tmp_path, file, numbers)
    assert 'video_decoder: computes another result than recorded' in refused(bundle, tmp_path)


def test_frames_that_are_not_finite_are_an_error(refused, player, bundle_folder, tmp_path):
    """A prompt of such numbers makes them; the recorded calls do not use it."""
    tables = player.manifest['vectors']['video']['prompt_tables']
    entry = player.manifest['tables'][tables['text']]
    numbers = np.full(math.prod(entry['shape']), np.nan, '<f4')
    bundle = _changed(bundle_folder, tmp_path, entry['file'], numbers)
    assert 'a frame has numbers that are not finite' in refused(bundle, tmp_path)
    assert not (tmp_path / 'frames.bin').exists()


def test_errors_are_one_line(refused, bundle_folder, tmp_path):
    old = tmp_path / 'old'
    old.mkdir()
    (old / 'manifest.json').write_text(json.dumps({'schema': 'neodragon-bundle', 'version': 1}))
    for arguments, complaint in (
        ([tmp_path, tmp_path], 'manifest.json: cannot be read'),
        ([old, tmp_path], 'not a bundle of version 2'),
        ([bundle_folder, tmp_path, 'sm0000'], 'has no binaries for sm0000, only for sm8750; export for this chipset'),
    ):
        assert complaint in refused(*arguments)


def _changed(bundle: pathlib.Path, folder: pathlib.Path, file: str, numbers: np.ndarray) -> pathlib.Path:
    """Return a copy of a bundle in which one file has other numbers."""
    copy = shutil.copytree(bundle, folder / 'bundle')
    numbers.astype('<f4').tofile(copy / file)
    return copy


def _frames(runner: pathlib.Path, bundle: pathlib.Path, out: pathlib.Path) -> np.ndarray:
    """Return the frames that the runner makes, in the size that the decoder gives if the number of bytes is that."""
    subprocess.run([runner, bundle, out], check=True, capture_output=True)
    video = json.loads((bundle / 'manifest.json').read_text())['video']
    shape = (video['frames'], video['height'], video['width'], 3)
    frames = np.fromfile(out / 'frames.bin', np.uint8)
    return frames.reshape(shape) if frames.size == math.prod(shape) else frames


def _add_super_resolution(bundle: pathlib.Path) -> None:
    """Give a bundle a graph that doubles frames, with its recorded call."""
    manifest = json.loads((bundle / 'manifest.json').read_text())
    video = manifest['video']
    small, large = ([1, size * video['height'], size * video['width'], 3] for size in (1, 2))
    constants = {'scales': np.float32([1, 2, 2, 1]), 'dark': np.float32(0.9)}
    nodes = [
        helper.make_node('Resize', ['frame', '', 'scales'], ['doubled'], mode='nearest'),
        helper.make_node('Mul', ['doubled', 'dark'], ['enlarged']),
    ]
    tensors = [
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)]
        for name, shape in (('frame', small), ('enlarged', large))
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, 'super_resolution', *tensors, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    call = np.repeat(np.float32([1, 0.9]), [math.prod(small), math.prod(large)])
    content = {
        'portable/super_resolution.onnx': model.SerializeToString(),
        'vectors/super_resolution.bin': call.astype('<f4').tobytes(),
    }
    for name, data in content.items():
        (bundle / name).write_bytes(data)
        manifest['files'][name] = {'bytes': len(data), 'sha256': hashlib.sha256(data).hexdigest()}
    entry = json.loads(json.dumps(manifest['graphs']['video_decoder']))
    tensor = lambda sides, shape: next(iter(entry[sides].values())) | {'shape': shape}
    entry |= {
        'portable': ['portable/super_resolution.onnx'],
        'inputs': {'frame': tensor('inputs', small)},
        'outputs': {'enlarged': tensor('outputs', large)},
        'vector': entry['vector'] | {'file': 'vectors/super_resolution.bin', 'compared': ['enlarged']},
    }
    manifest['graphs']['super_resolution'] = entry
    manifest['phases'][-1]['graphs'].append('super_resolution')
    data = json.dumps(manifest).encode()
    (bundle / 'manifest.json').write_bytes(data)
    (bundle / 'manifest.json.sha256').write_text(f'{hashlib.sha256(data).hexdigest()}  manifest.json\n')
