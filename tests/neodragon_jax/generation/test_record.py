"""Tests of the videos that a command finds: whole or damaged, and made with these settings or with others."""

from __future__ import annotations

import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.generation.jobs import make_jobs
from neodragon_jax.generation.options import ModelOptions, VideoOptions
from neodragon_jax.generation.record import check_record, make_record
from support.goldens import TINY_CHECKPOINT
from support.sessions import make, write_video

SIZE = {'frames': 9, 'height': 64, 'width': 128}


def record_of(seed: int = 0, root: pathlib.Path = TINY_CHECKPOINT, **options: object) -> dict[str, object]:
    """Return the record of a run on the miniature."""
    names = ModelOptions.__dataclass_fields__
    model = {name: value for name, value in options.items() if name in names}
    video = SIZE | {name: value for name, value in options.items() if name not in names}
    return make_record(ModelOptions(root, **model), VideoOptions(**video), seed)


def cut(share: float):
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


@pytest.mark.parametrize('suffix', ['.mp4', '.png'])
@pytest.mark.parametrize(
    'damage',
    [
        lambda path: path.write_bytes(b''),
        cut(0.5),
        cut(0.97),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_text('not a video'),
        lambda path: path.unlink(),
    ],
    ids=['empty', 'half', 'nearly whole', 'a few bytes less', 'text', 'absent'],
)
def test_damaged_files_are_made_again(tmp_path, damage, suffix):
    path = tmp_path / 'a cat-0.mp4'
    write_video(path)
    assert make_jobs(['a cat'], 1, tmp_path).todo == []
    damage(path.with_suffix(suffix))
    jobs = make_jobs(['a cat'], 1, tmp_path)
    assert [job.path for job in jobs.todo] == [path] and jobs.made == []
    assert jobs.damaged == (jobs.todo if path.exists() else [])


def test_a_folder_with_the_name_of_a_video_is_refused_first(tmp_path):
    (tmp_path / 'a cat-0.mp4').mkdir()
    with pytest.raises(InputError, match=r'a cat-0\.mp4: a folder has the name of a video'):
        make_jobs(['a cat'], 1, tmp_path)


@pytest.mark.parametrize(
    'options',
    [
        {'seed': 1},
        {'mode': 'monolithic'},
        {'dtype': 'bfloat16'},
        {'frames': 17},
        {'steps': (1, 2, 1)},
        {'guidance': 2.0},
        {'noise': 'portable'},
        {'prompt_modifier': '!'},
        {'first_frame': 'denoiser'},
        {'image': np.zeros((64, 128, 3), np.uint8)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_settings_are_refused(tmp_path, options):
    write_video(tmp_path / 'a.mp4', record_of())
    assert check_record(tmp_path / 'a.png', record_of())
    with pytest.raises(InputError, match=rf'a\.mp4: was made with {next(iter(options))} .*Give another --out') as error:
        check_record(tmp_path / 'a.png', record_of(**options))
    assert '\n' not in str(error.value)


def test_the_same_videos_have_the_same_record(tmp_path):
    """Speed, memory, a text without effect and the place of the checkpoint do not count; its content does."""
    copy = pathlib.Path(shutil.copytree(TINY_CHECKPOINT, tmp_path / 'copy'))
    same = {'low_memory': True, 'profile': True, 'negative_prompt': 'blurry', 'steps': [1, 1, 1]}
    assert record_of(root=copy, **same) == record_of()
    assert record_of(guidance=2.0, negative_prompt='blurry') != record_of(guidance=2.0)
    module, params = checkpoint.load(copy / folders.STUDENT)
    params['blocks_0']['image_query']['kernel'] = params['blocks_0']['image_query']['kernel'] * 2
    checkpoint.save(copy / folders.TEACHER, module, params)
    assert record_of(root=copy) == record_of(), 'the teacher makes no video in this mode'
    student = record_of(student=copy)
    assert student != record_of() and student == record_of(root=copy, student=TINY_CHECKPOINT)
    checkpoint.save(copy / folders.STUDENT, module, {**params, 'head': {k: v + 1 for k, v in params['head'].items()}})
    changed = record_of(root=copy)
    assert changed != record_of() and {name for name in changed if changed[name] != record_of()[name]} == {'checkpoint'}


def test_a_student_is_refused_in_the_mode_of_the_multi_step_denoiser():
    with pytest.raises(InputError, match='--student is for hybrid mode, but the mode is monolithic'):
        record_of(student=TINY_CHECKPOINT, mode='monolithic')


def test_the_command_compares_existing_videos(tmp_path, capsys):
    """A whole video of the same settings is kept, one of others is refused, and one without a record is named."""
    for name in ('a', 'b'):
        write_video(tmp_path / f'{name}-0.mp4', record_of(seed=3) if name == 'a' else None)
    prompts = ['--prompt', 'a', '--prompt', 'b']
    assert make(tmp_path, *prompts, '--seed', '3') == 0
    said = capsys.readouterr().out
    assert f'2 of 2 videos exist already in {tmp_path}' in said
    assert '1 of these do not tell how they were made and are kept, such as ' + str(tmp_path / 'b-0.mp4') in said
    assert make(tmp_path, *prompts, '--seed', '4') == 2
    assert 'a-0.mp4: was made with seed 3; this run has 4.' in capsys.readouterr().err


def test_videos_in_a_bucket(bucket):
    write_video(bucket / 'a-0.mp4', record_of())
    (bucket / 'b-0.mp4').write_bytes(b'')
    jobs = make_jobs(['a', 'b', 'c'], 1, bucket)
    assert [job.prompt for job in jobs.made] == ['a'] and [job.prompt for job in jobs.damaged] == ['b']
    assert check_record(bucket / 'a-0.png', record_of())
    with pytest.raises(InputError, match=r'gs://.*/a-0\.mp4: was made with seed 0'):
        check_record(bucket / 'a-0.png', record_of(seed=1))


@pytest.mark.long
def test_a_made_video_has_the_record_of_its_command(tmp_path, capsys):
    more = ['--mode', 'monolithic', '--prompt', 'a cat', '--steps', '1', '1', '1']
    (tmp_path / 'a cat-0.mp4').write_bytes(b'')
    assert make(tmp_path, *more) == 0
    assert '1 videos are damaged, or without their contact sheet, and are made again' in capsys.readouterr().out
    with Image.open(tmp_path / 'a cat-0.png') as sheet:
        assert '"prompt": "a cat"' in sheet.info['neodragon_jax']
    assert make(tmp_path, *more) == 0
    assert '1 of 1 videos exist already' in capsys.readouterr().out
    assert make(tmp_path, *more[:-1], '2') == 2
