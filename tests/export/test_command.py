"""`python -m export` on the miniature checkpoint: all graphs on the simulator, resuming, and errors in one line."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
from typing import Any

import numpy as np
import pytest
from PIL import Image

import export.__main__ as command
from export.__main__ import main, make_options, parse_args
from export.graphs.table import GRAPH_SPECS
from export.host.calibration_set import CalibrationSet
from export.qnn.chipsets import TARGETS
from export.report.report import Report
from neodragon_jax.base.command_line import FAILED_FILE
from neodragon_jax.base.folder_lock import folder_lock
from neodragon_jax.generation.first_frame import FirstFrameModel
from support.export_rows import make_row
from support.goldens import ROOT, TINY_CHECKPOINT

SIZE = ['--height', '64', '--width', '64', '--frames', '9']
SIMULATED = 'sm8750'
COUNTS = ['--calibration-samples', '12', '--evaluation-prompts', '2', '--evaluation-samples', '1']
COUNTS += ['--validation-prompts', '2', '--simulated-samples', '1']
# One of every architecture, and the laptop; test_chipsets compiles a small graph for all chipsets.
SOCS = f'{SIMULATED},sm8550,sm8650,sm8850,sc8380xp'
EXACT_DB = 100.0


@pytest.fixture(scope='module')
def arguments(upscaler) -> list[str]:
    return ['--checkpoint', str(TINY_CHECKPOINT), '--upscale', str(upscaler), *SIZE, *COUNTS]


@pytest.fixture(scope='module')
def exported(arguments, tmp_path_factory) -> pathlib.Path:
    """The output of one run over all graphs, for all chipsets."""
    out = tmp_path_factory.mktemp('export')
    assert main([*arguments, '--soc', SOCS, '--out', str(out)]) == 0
    return out


@pytest.fixture(scope='module')
def rows(exported) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of that run's report by graph and chipset."""
    report = json.loads((exported / 'report.json').read_text())
    return {(row['graph'], row['chipset']): row for row in report['graphs']}


@pytest.mark.long
@pytest.mark.qnn
def test_all_graphs_meet_their_targets_on_the_simulator(exported, rows):
    """On held-out calls of the real program, without any fallback to the CPU."""
    for name in GRAPH_SPECS:
        row = rows[name, SIMULATED]
        assert row['met'] and row['ships'] and row['htp_db'] >= row['target_db']
        assert row['onnx_db'] > EXACT_DB
        if row['precision'] == 'w8a16' and row['lowest_db'] < 55:
            # Group norms run in FP16 on the HTP, which adds an error that the graph on the CPU does not have.
            assert abs(row['htp_db'] - row['lowest_db']) < (2.5 if row['float_operations'] else 1), name
    assert '| first_frame_unet | w8a16 * |' in (exported / 'report.md').read_text()


@pytest.mark.long
@pytest.mark.qnn
def test_all_graphs_are_compiled_for_all_chipsets(exported, rows):
    assert list(rows) == [(name, chipset) for name in GRAPH_SPECS for chipset in SOCS.split(',')]
    for (name, chipset), row in rows.items():
        binary = 'denoiser' if name.startswith('denoiser_stage') else name
        folder = exported / f'{binary}-qnn-{row["precision"]}-{chipset}'
        metadata = json.loads((folder / 'metadata.json').read_text())
        identity = {key: value for key, value in dataclasses.asdict(TARGETS[chipset]).items() if key != 'aliases'}
        assert metadata['chipset'] == identity
        assert all((folder / file).stat().st_size == entry['bytes'] for file, entry in metadata['model_files'].items())
        assert row['qnn_operations'] > 0 and (chipset == SIMULATED or row['htp_db'] is None)


@pytest.mark.long
@pytest.mark.qnn
def test_pictures_stay_channels_last(rows):
    """Convolutional graphs transpose only the attention's keys; only group norms compute in floating point."""
    rows = {name: rows[name, SIMULATED] for name in GRAPH_SPECS}
    for name, most in (('video_decoder', 0), ('super_resolution', 0), ('video_encoder', 1), ('first_frame_decoder', 1)):
        assert rows[name]['transposes'] <= most, name
    assert rows['video_decoder']['float_operations'] == rows['super_resolution']['float_operations'] == 0
    assert rows['first_frame_unet']['transposed_mb'] < 0.06 * rows['first_frame_unet']['moved_mb']


@pytest.mark.long
@pytest.mark.qnn
def test_bits_of_keys_and_values_have_a_measured_reason(exported):
    """The choice is made on validation prompts, calls and whole videos, and holds for all stages."""
    recipe = json.loads((exported / 'denoiser-key-values' / 'recipe.json').read_text())
    stages = [name for name in GRAPH_SPECS if name.startswith('denoiser_stage')]
    assert list(recipe['calls_db']) == stages[: len(recipe['calls_db'])] and recipe['reason']
    if recipe['bits'] == 8:
        assert all(recipe['calls_db'][name] >= GRAPH_SPECS[name].target_db + 3 for name in stages)
        assert recipe['video_db'] >= 28
    for name in stages:
        metadata = json.loads((exported / f'{name}-onnx-w8a16' / 'metadata.json').read_text())
        assert metadata['key_value_bits'] == recipe['bits'] and metadata['validation_db'] > GRAPH_SPECS[name].target_db


@pytest.mark.long
@pytest.mark.qnn
def test_whole_video_of_exported_graphs(exported):
    videos = json.loads((exported / 'report.json').read_text())['videos']
    assert [(video['graphs'], video['runner']) for video in videos] == [('the denoiser', 'CPU'), ('all graphs', 'CPU')]
    denoiser, everything = videos
    assert len(denoiser['latents_db']) == len(everything['frames_db']) == 2
    assert min(denoiser['latents_db'].values()) > 30
    assert min(everything['latents_db'].values()) > 25 and min(everything['frames_db'].values()) > 25


@pytest.mark.long
@pytest.mark.qnn
def test_binary_folder_is_complete(exported):
    folder = exported / 'video_decoder-qnn-w8a16-sm8750'
    metadata = json.loads((folder / 'metadata.json').read_text())
    assert {path.name for path in folder.iterdir()} == {*metadata['model_files'], 'metadata.json'}
    assert metadata['chipset']['product'] == 'Snapdragon 8 Elite'
    latent = metadata['inputs']['latent']
    assert latent['shape'] == [1, 8, 8, 16] and latent['quantized_inside_to']['type'] == 'uint16'
    assert list(metadata['outputs']) == ['frames', *(f'next_memory_{index}' for index in range(9))]
    assert not [path for path in exported.rglob('.*')]


def files_of(out: pathlib.Path) -> dict[str, int]:
    """Return the modification time of each file except the report, in nanoseconds."""
    paths = [path for path in out.rglob('*') if path.is_file() and path.parent != out]
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in paths}


@pytest.fixture(scope='module')
def picture(tmp_path_factory) -> str:
    """A first frame, so that recording does not run the first-frame model."""
    path = tmp_path_factory.mktemp('picture') / 'picture.png'
    pixels = np.random.default_rng(0).integers(0, 255, (4, 4, 3), np.uint8)
    Image.fromarray(pixels).resize((64, 64)).save(path)
    return str(path)


@pytest.mark.long
@pytest.mark.qnn
def test_finished_steps_are_kept_and_lost_ones_made_again(picture, tmp_path, monkeypatch, capsys):
    """A second run loads no program and writes nothing; after files are lost, it repeats only the affected steps."""
    from export.host.phone_program import PhoneProgram

    graphs = 'denoiser_modulation,denoiser_stage0,denoiser_stage1'
    command = ['--checkpoint', str(TINY_CHECKPOINT), *SIZE, *COUNTS, '--image', picture, '--graphs', graphs]
    command += ['--out', str(tmp_path)]
    assert main(command) == 0
    before = files_of(tmp_path)
    monkeypatch.setattr(PhoneProgram, 'open_recording', lambda self: pytest.fail('the calibration set is complete'))
    assert main(command) == 0
    assert files_of(tmp_path) == before, 'the simulator results of shared binaries are kept, too'
    lost = ('denoiser-qnn-w8a16-sm8750', 'denoiser_modulation-qnn-fp16-sm8750', 'denoiser_stage1-onnx-w8a16')
    (binary,) = (tmp_path / lost[0]).glob('*.bin')
    binary.unlink()
    shutil.rmtree(tmp_path / lost[1])
    (tmp_path / lost[2] / 'denoiser_stage1.onnx').write_bytes(b'')
    capsys.readouterr()
    assert main([*command, '--no-simulate']) == 0
    again = [line for line in capsys.readouterr().out.splitlines() if 'making it again' in line]
    assert [binary.name in again[1], 'denoiser_stage1.onnx has 0 bytes' in again[0], len(again)] == [True, True, 2]
    after = files_of(tmp_path)
    assert set(after) == set(before)
    assert {name.split('/')[0] for name in after if after[name] != before[name]} == set(lost)
    (binary,) = json.loads((tmp_path / 'report.json').read_text())['shared_binaries']
    assert binary['graphs'] == ['denoiser_stage0', 'denoiser_stage1'] and binary['separate_mb'] is None
    assert 0.3 < binary['binary_mb'] < 1  # for TINY, mostly the graphs themselves


@pytest.mark.long
@pytest.mark.qnn
@pytest.mark.parametrize(('graphs', 'drawn'), [('clip_l,context_adapter', 0), ('first_frame_decoder,video_encoder', 5)])
def test_recording_goes_only_as_far_as_the_graphs_need(graphs, drawn, tmp_path, monkeypatch):
    """The denoiser, which takes most of the time, does not run if no exported graph reads its output."""
    draw, pictures = FirstFrameModel.__call__, []
    monkeypatch.setattr('export.host.recording.sample', lambda *args: pytest.fail('no graph needs the latents'))
    monkeypatch.setattr(FirstFrameModel, '__call__', lambda *args: pictures.append(draw(*args)) or pictures[-1])
    command = ['--checkpoint', str(TINY_CHECKPOINT), *SIZE, *COUNTS, '--graphs', graphs, '--prompts', '1']
    # One sample is too few for a good range.
    command += ['--no-simulate', '--allow-below-target', '--out', str(tmp_path)]
    assert main(command) == 0
    report = json.loads((tmp_path / 'report.json').read_text())
    assert [row['graph'] for row in report['graphs']] == [name for name in GRAPH_SPECS if name in graphs.split(',')]
    assert len(pictures) == drawn, 'one for calibration, two each for validation and evaluation'


@pytest.mark.long
@pytest.mark.qnn
def test_other_calibration_set_is_refused(exported, arguments, capsys):
    command = [*arguments, '--out', str(exported), '--seed', '7', '--prompts', '1']
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'recorded with other' in line and 'seed' in line and '--calibration' in line


@pytest.mark.qnn
@pytest.mark.parametrize('folder', ['out', 'set'])
def test_a_folder_that_another_run_writes_into_is_refused(folder, tmp_path, capsys):
    command = ['--checkpoint', str(TINY_CHECKPOINT), *SIZE, *COUNTS, '--graphs', 'clip_l', '--no-simulate']
    command += ['--out', str(tmp_path / 'out'), '--calibration', str(tmp_path / 'set')]
    with folder_lock(tmp_path / folder):
        assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / folder) in line and 'writes into it' in line
    assert not (tmp_path / folder).exists(), 'the lock removes the folder that it made'


@pytest.mark.long
@pytest.mark.qnn
def test_a_set_of_more_graphs_serves_fewer(exported, arguments, tmp_path, monkeypatch, capsys):
    from export.host.phone_program import PhoneProgram

    monkeypatch.setattr(PhoneProgram, 'open_recording', lambda self: pytest.fail('the calibration set is complete'))
    for graphs in ('clip_l', 'super_resolution'):
        command = [*arguments, '--graphs', graphs, '--calibration', str(exported / 'calibration')]
        capsys.readouterr()
        assert main([*command, '--no-simulate', '--out', str(tmp_path)]) == 0
        steps = re.findall(r'(?m)^\[(\d+)/(\d+)\]', capsys.readouterr().out)
        assert steps == [(str(number), str(len(steps))) for number in range(1, len(steps) + 1)], (
            'all are counted before'
        )
    row = json.loads((tmp_path / 'report.json').read_text())['graphs'][0]
    assert row['graph'] == 'super_resolution' and row['lowest_db'] > row['target_db']


def test_exit_status_is_the_verdict(monkeypatch, tmp_path, capsys):
    good, bad, other = (Report([row], [], {}) for row in (make_row(31.0), make_row(28.9), make_row(28.0, 'fp16')))
    arguments = ['--checkpoint', 'c', '--out', str(tmp_path)]
    monkeypatch.setattr('export.__main__.run', lambda _: good)
    assert main(arguments) == 0
    monkeypatch.setattr('export.__main__.run', lambda _: bad)
    assert main(arguments) == 1
    assert 'denoiser_stage0, w8a16, sm8750: 28.9 dB, target 29 dB' in capsys.readouterr().err
    assert main([*arguments, '--allow-below-target']) == 0
    assert make_row(None).deploy_db == 40.0
    assert other.below_target and not Report([*good.rows, *other.rows], [], {}).below_target


@pytest.mark.long
@pytest.mark.qnn
@pytest.mark.parametrize('checker', [False, True])
def test_a_safety_checker_is_not_dropped_without_a_word(checker, tmp_path, capsys):
    """JAX makes refused frames black; the exported graphs show them."""
    root = tmp_path / 'checkpoint'
    root.mkdir()
    for folder in TINY_CHECKPOINT.iterdir():
        (root / folder.name).symlink_to(folder)
    if checker:
        (root / 'safety_checker').mkdir()
    command = ['--checkpoint', str(root), *SIZE, *COUNTS, '--graphs', 'clip_l', '--no-simulate']
    assert main([*command, '--out', str(tmp_path / 'out')]) == 0
    said = f'The safety checker of {root} is not exported'
    assert (f'warning: {said}' in capsys.readouterr().err) == checker
    assert (said in (tmp_path / 'out' / 'report.md').read_text()) == checker


def test_half_of_a_safety_checker_is_refused_before_videos_are_recorded(tmp_path, monkeypatch, capsys):
    root = tmp_path / 'checkpoint'
    root.mkdir()
    for folder in TINY_CHECKPOINT.iterdir():
        (root / folder.name).symlink_to(folder)
    (root / 'feature_extractor').mkdir()
    monkeypatch.setattr(CalibrationSet, 'record', lambda *args: pytest.fail('the long work has begun'))
    command = ['--checkpoint', str(root), *SIZE, *COUNTS, '--graphs', 'clip_l', '--no-simulate']
    assert main([*command, '--out', str(tmp_path / 'out')]) == 2
    assert 'safety_checker: no such folder, but feature_extractor' in capsys.readouterr().err


def test_full_disk_is_one_line(monkeypatch, tmp_path, capsys):
    def fail(args: object) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('export.__main__.run', fail)
    assert main(['--checkpoint', 'c', '--out', str(tmp_path)]) == FAILED_FILE
    (line,) = capsys.readouterr().err.splitlines()
    assert 'no space is left on the disk' in line and 'free some' in line


def test_missing_provider_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, 'PACKAGES', (*command.PACKAGES, 'no_such_provider'))
    assert main(['--checkpoint', str(TINY_CHECKPOINT), '--out', str(tmp_path / 'out')]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'no_such_provider: not installed' in line and 'pip install' in line


def test_a_student_brings_its_schedule(student_folder, tmp_path):
    """With --student, and with --denoiser alone: the denoiser is valid only at the levels of the record beside it."""
    whole = make_options(parse_args(['--checkpoint', str(TINY_CHECKPOINT), '--student', str(student_folder),
                                     '--out', str(tmp_path)]))  # fmt: skip
    assert whole.denoiser == student_folder / 'diffusion_transformer_320p'
    assert whole.program.adapter == student_folder / 'context_adapter'
    part = make_options(parse_args(['--checkpoint', str(TINY_CHECKPOINT), '--denoiser', str(whole.denoiser),
                                    '--out', str(tmp_path)]))  # fmt: skip
    for plan in (whole.program.plan, part.program.plan):
        assert (plan.steps, plan.first_steps, plan.schedule.spacing) == ((1, 2, 1), (2, 1, 1), 'even')


@pytest.mark.parametrize(
    ('arguments', 'complaint'),
    [
        (['--soc', 'sm8750,sm875'], 'Did you mean "sm8750"?'),
        (['--precision', 'w8a6'], 'Did you mean "w8a16"?'),
        (['--precision', ','], '--precision is empty'),
        (['--ranges', 'minmx'], 'Did you mean "minmax"?'),
        (['--graphs', 'denoizer'], "--graphs has 'denoizer'"),
        (['--graphs', 'super_resolution'], "--graphs has 'super_resolution'"),
        (['--prompts-file', 'missing.txt'], 'missing.txt: no such file'),
        (['--evaluation-samples', '0'], '--evaluation-samples is 0'),
        (['--evaluation-samples', '9'], 'a video keeps 8 calls'),
        (['--prompts', '0'], '--prompts is 0'),
        (['--evaluation-prompts', '17'], '--evaluation-prompts is 17'),
        (['--evaluation-prompts-file', 'missing.txt'], 'missing.txt: no such file'),
        (['--compare', '--graphs', 'denoiser_stage0'], '--compare is about denoiser_stage2'),
        (['--frames', '20'], 'use 8 n + 1'),
        (['--out', str(ROOT / 'export' / 'phone')], 'a folder of the source code'),
        (['--denoiser', 'missing'], 'missing: no such folder'),
        (['--student', 'missing'], '--student missing: no such folder'),
        (['--student', 'missing', '--denoiser', 'other'], 'leave --denoiser and --adapter out'),
        (['--student', 'missing', '--mode', 'monolithic'], '--student is for hybrid mode'),
        (['--denoiser', str(TINY_CHECKPOINT / 'context_adapter')], 'holds a ContextAdapter'),
        (['--upscale', str(TINY_CHECKPOINT / 'context_adapter')], 'holds a ContextAdapter'),
    ],
)
def test_wrong_input_is_one_line(arguments, complaint, tmp_path, capsys):
    assert main(['--checkpoint', str(TINY_CHECKPOINT), '--out', str(tmp_path / 'out'), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and complaint in line
    assert not (tmp_path / 'out').exists()
