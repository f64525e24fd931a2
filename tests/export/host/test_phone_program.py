"""The program of a checkpoint: its graphs and options, recorded calls, and the number of videos."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from export import __main__ as command
from export.graphs.runners import Call
from export.graphs.table import GRAPH_SPECS
from export.host import modules
from export.host.calibration_set import CalibrationSet
from export.host.phone_program import PhoneProgram, available
from export.host.protocol import Protocol
from export.host.recorded_graph import recorded_graphs
from export.host.recording import Scenes, calls_per_video, flatten, rotating, spread, unflatten, videos_needed
from export.steps import whole_video
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import folders
from neodragon_jax.checkpoint.fingerprint import fingerprint
from neodragon_jax.generation.plan import make_plan
from support.arrays import normal
from support.goldens import TINY_CHECKPOINT


@pytest.fixture(scope='module')
def without_model(tmp_path_factory) -> pathlib.Path:
    """A checkpoint without a first-frame model; its denoiser generates the first frame."""
    root = tmp_path_factory.mktemp('without_model')
    for folder in TINY_CHECKPOINT.iterdir():
        if not folder.name.startswith('ssd_1b'):
            (root / folder.name).symlink_to(folder)
    modes = {'hybrid': {'first_frame': 'denoiser', 'steps': [2, 1, 1]}}
    values = {'frames': 17, 'height': 64, 'width': 128, 'prompt_modifier': '', 'example': 'a circle', 'modes': modes}
    (root / 'generation.json').write_text(json.dumps(values))
    return root


def test_a_checkpoint_without_a_first_frame_model(without_model, graphs, options):
    given = dataclasses.replace(options, root=without_model, first_frame='denoiser')
    first = {*modules.FIRST_FRAME, 'video_encoder'}
    assert set(modules.phone_modules(given)) == set(graphs) - first
    with_image = dataclasses.replace(given, images=True)
    assert set(modules.phone_modules(with_image)) == set(graphs) - set(modules.FIRST_FRAME)
    with pytest.raises(InputError, match='ssd_1b_vae'):
        modules.phone_modules(dataclasses.replace(given, first_frame='model'))


def test_generation_json_sets_the_options_that_the_command_line_leaves_open(without_model):
    make = lambda *options: command.make_options(command.parse_args(['--out', 'x', '--checkpoint', *options]))
    options = make(str(without_model))
    program = PhoneProgram(options.program, options.denoiser, options.names)
    plan = options.program.plan
    assert (plan.frames, plan.height, plan.width, plan.steps) == (3, 8, 16, (2, 1, 1))
    replays = [(replay.graphs, replay.runner) for replay in whole_video.planned(program, True, False)]
    assert replays == [('the denoiser', 'CPU'), ('all graphs', 'CPU')]
    assert whole_video.planned(program, on_cpu=False, simulated=False) == []
    assert (
        not program.starts_from_picture
        and not program.runs_first_frame_model
        and program.denoiser.form.supports_frame_zero
    )
    assert 'video_encoder' not in program.names and 'denoiser_stage2' in program.names
    assert options.scenes.text(0) == options.scenes.prompts[0], 'the modifier is empty'
    changed = make(str(without_model), '--frames', '9', '--steps', '1', '1', '1')
    assert changed.program.plan.frames == 2
    released = make(str(TINY_CHECKPOINT)).program
    assert (released.mode, released.frames, released.size, released.first_frame) == ('hybrid', 49, (320, 512), 'model')
    with pytest.raises(InputError, match='no such checkpoint'):
        make('nowhere')
    with pytest.raises(InputError, match='--first-frame model is for --mode hybrid'):
        make(str(without_model), '--mode', 'monolithic', '--first-frame', 'model')


def all_graphs(mode, first_frame, images):
    """Return the program of all graphs of the miniature checkpoint."""
    plan = make_plan(mode, 9, 64, 64, steps=(1, 1, 1))
    options = modules.ProgramOptions(TINY_CHECKPOINT, mode, plan, first_frame=first_frame, images=images)
    folder = options.find(folders.DENOISER_FOLDERS[mode])
    return PhoneProgram(options, folder, available(options))


@pytest.mark.parametrize('images', [False, True])
@pytest.mark.parametrize(
    ('mode', 'first_frame'), [('hybrid', 'model'), ('hybrid', 'denoiser'), ('monolithic', 'denoiser')]
)
def test_a_video_that_starts_from_a_picture_has_the_encoder(mode, first_frame, images):
    """Images may be given in every mode."""
    program = all_graphs(mode, first_frame, images)
    assert program.starts_from_picture == (images or first_frame == 'model')
    assert ('video_encoder' in program.modules) == ('video_encoder' in program.names) == program.starts_from_picture


@pytest.mark.long
def test_a_given_picture_starts_a_monolithic_video():
    recording = all_graphs('monolithic', 'denoiser', images=True).open_recording()
    video, calls = recording.generate(Scenes(['a cat'], images=[np.zeros((64, 64, 3), np.float32)]), 0)
    assert video.first_frame is not None and video.frames is not None and len(calls['video_encoder']) == 1


def test_unknown_graphs_are_refused():
    names = list(GRAPH_SPECS)
    assert modules.select('first_frame,dt5', names) == ['dt5', *modules.FIRST_FRAME]
    assert modules.select(None, names) == names
    for wrong in ('denoizer', ','):
        with pytest.raises(InputError, match='--graphs'):
            modules.select(wrong, names)


def test_calls_survive_the_disk():
    call = Call({'latent': normal(1, 2, 2), 'memory_0': normal(2, 3)}, {'frames': normal(3, 2)})
    back = unflatten({path: array.copy() for path, array in flatten(call).items()})
    assert isinstance(back, Call) and set(back.inputs) == {'latent', 'memory_0'}
    np.testing.assert_array_equal(back.inputs['memory_0'], call.inputs['memory_0'])
    np.testing.assert_array_equal(back.outputs['frames'], call.outputs['frames'])


def test_every_step_of_a_recurrent_graph_is_met():
    met = [rotating(range(7), 1, video)[0] for video in range(1, 8)]
    assert sorted(met) == list(range(7)), 'zero memories are one in seven'
    assert rotating(range(6), 3, 0) == [0, 2, 4] and rotating(range(2), 5, 1) == [0, 1]
    assert spread(list(range(10)), 3) == [0, 4, 9] and spread([0, 1], 3) == [0, 1]


def test_videos_that_the_table_takes():
    hybrid = calls_per_video(make_plan('hybrid', 49, 64, 128), first_frame_given=True)
    assert (hybrid['video_decoder'], hybrid['super_resolution'], hybrid['denoiser_stage1']) == (7, 49, 6)
    counts = {name: GRAPH_SPECS[name].calibration_samples for name in hybrid}
    assert videos_needed(hybrid, counts) == 500, 'one picture of the first-frame decoder per video'
    guided = calls_per_video(make_plan('monolithic', 17, 64, 128, steps=(2, 1, 1)), first_frame_given=False)
    assert (guided['dt5'], guided['denoiser_stage0']) == (2, 12)


@pytest.fixture
def checkpoint(tmp_path) -> pathlib.Path:
    """A copy of the miniature checkpoint that a test may change."""
    return pathlib.Path(shutil.copytree(TINY_CHECKPOINT, tmp_path / 'checkpoint'))


def program_of(root: pathlib.Path, options: modules.ProgramOptions, names: list[str] | None = None) -> PhoneProgram:
    given = dataclasses.replace(options, root=root)
    return PhoneProgram(given, root / folders.STUDENT, names or ['clip_l'])


def is_read(root: pathlib.Path, folder: pathlib.Path, options: modules.ProgramOptions) -> bool:
    """Return whether the program does not load without a folder."""
    away = folder.rename(root.parent / folder.name)
    try:
        program = program_of(root, options, ['first_frame_unet', 'video_decoder'])
        program.open_recording()
        return False
    except InputError:
        return True
    finally:
        away.rename(folder)


@pytest.mark.long
def test_every_folder_that_the_program_reads_is_fingerprinted(checkpoint, options):
    """A folder without which the program does not load is an input: each of its files changes the fingerprints."""
    before, read = program_of(checkpoint, options).weights, []
    for folder in sorted(path for path in checkpoint.iterdir() if path.is_dir()):
        if not is_read(checkpoint, folder, options):
            continue
        read.append(folder.name)
        for path in sorted(folder.iterdir()):
            content, program = path.read_bytes(), program_of(checkpoint, options)
            assert program.modules
            path.write_bytes(content + b'\n')
            assert program.weights != before, path
            path.write_bytes(content)
    assert {*folders.TOKENIZERS, *folders.FIRST_FRAME_TOKENIZERS, folders.T5, folders.STUDENT} <= set(read)
    assert program_of(checkpoint, options).weights == before


def test_model_cards_are_no_part_of_a_fingerprint(checkpoint):
    before = fingerprint(checkpoint / folders.STUDENT)
    (checkpoint / folders.STUDENT / 'README.md').write_text('text')
    assert fingerprint(checkpoint / folders.STUDENT) == before


def identities(root: pathlib.Path, options: modules.ProgramOptions) -> tuple[str, dict[str, object]]:
    """Return the hash of the protocol, and what the graphs are made from."""
    program = program_of(root, options, ['dt5', 'context_adapter', 'denoiser_stage0'])
    nothing = Scenes(())
    protocol = Protocol(program.weights, nothing, nothing, nothing, program.options.plan, {}, 0, {})
    graphs = recorded_graphs(program, CalibrationSet(root, protocol), dict.fromkeys(program.names, 1), 1)
    return protocol.sha256, {graph.name: graph.made_from for graph in graphs}


def test_the_length_of_prompts_is_part_of_recordings_and_graphs(checkpoint, options):
    before, length = identities(checkpoint, options), program_of(checkpoint, options).options.text_tokens
    config = checkpoint / folders.T5_TOKENIZER / 'tokenizer_config.json'
    config.write_text(json.dumps(json.loads(config.read_text()) | {'model_max_length': length // 2}))
    after = identities(checkpoint, options)
    assert program_of(checkpoint, options).options.text_tokens == length // 2
    assert after[0] != before[0]
    assert all(after[1][name] != before[1][name] for name in before[1])


def test_a_checkpoint_in_a_bucket_is_copied_as_far_as_the_export_needs_it(bucket, bucket_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bucket_store.put(f'{TINY_CHECKPOINT}/', f'{bucket}/model/', recursive=True)
    arguments = ['--out', 'x', '--checkpoint', f'{bucket}/model', '--first-frame', 'denoiser']
    root = command.make_options(command.parse_args(arguments)).program.root
    found = {path.name for path in root.iterdir()}
    assert {folders.STUDENT, folders.VIDEO_VAE, folders.T5} <= found
    assert not found & {folders.FIRST_FRAME_UNET, folders.TEACHER}
