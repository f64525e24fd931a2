"""The C++ runner: built by the test, run on the CPU provider, compared with the player on the same encoded prompt."""

import dataclasses
import json
import math
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
from neodragon_phone import noise
from neodragon_phone.chipsets import find_chipset
from neodragon_phone.denoiser import generate_latents
from neodragon_phone.frames import decode
from neodragon_phone.player import snr_db
from neodragon_phone.text import Prompt

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
    assert run.stdout.count('canary ') == 5
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
