"""Tests of buckets on an emulator of Google Cloud Storage: uploads, copies on local disk, and locks."""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import time

import numpy as np
import pytest

from neodragon_jax.base import bucket as buckets
from neodragon_jax.base import bucket_lock
from neodragon_jax.base.atomic import atomic_file, atomic_folder, check_writable
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.folder_lock import folder_lock
from neodragon_jax.base.paths import input_path
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import shipped
from neodragon_jax.checkpoint.fingerprint import fingerprint, sampled_fingerprint
from neodragon_jax.checkpoint.folders import STUDENT, STUDENT_ADAPTER
from neodragon_jax.generation.defaults import RELEASED
from neodragon_jax.generation.result import Video
from neodragon_jax.generation.student import find_student, with_student
from support.goldens import TINY_CHECKPOINT

# --- Uploads ----------------------------------------------------------------------------------------------------------


def test_a_file_is_uploaded_when_it_is_complete(bucket):
    with pytest.raises(ValueError), atomic_file(bucket / 'a b.txt') as draft:
        draft.write_text('half')
        raise ValueError
    assert not (bucket / 'a b.txt').exists()
    with atomic_file(bucket / 'a b.txt') as draft:
        assert draft.suffix == '.txt'
        draft.write_text('whole')
    assert (bucket / 'a b.txt').read_text() == 'whole'


def write(folder: pathlib.Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace('__', '/')
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.glob('*'))


def test_a_folder_replaces_the_files_of_an_older_one(bucket):
    with atomic_folder(bucket / 'out') as draft:
        write(draft, old='1', sub__kept='1')
    with pytest.raises(InputError, match='not empty'), atomic_folder(bucket / 'out'):
        pass
    with atomic_folder(bucket / 'out', replace=True) as draft:
        write(draft, sub__kept='2')
    assert names(bucket / 'out') == ['sub'] and (bucket / 'out' / 'sub' / 'kept').read_text() == '2'


def test_an_equal_folder_is_left_with_its_other_files(bucket, bucket_store):
    with atomic_folder(bucket / 'out') as draft:
        write(draft, sub__part='1')
    (bucket / 'out' / 'own').write_text('x')
    generation = lambda: bucket_store.info(os.fspath(bucket / 'out' / 'sub' / 'part'))['generation']
    before = generation()
    with atomic_folder(bucket / 'out', replace=True, keep_equal=True) as draft:
        write(draft, sub__part='1')
    assert names(bucket / 'out') == ['own', 'sub'] and generation() == before
    (bucket / 'out' / buckets.INCOMPLETE).write_text('')
    for part in '12':
        with atomic_folder(bucket / 'out', replace=True, keep_equal=True) as draft:
            write(draft, sub__part=part)
        assert names(bucket / 'out') == ['sub'] and (bucket / 'out' / 'sub' / 'part').read_text() == part


def test_a_folder_whose_upload_was_interrupted_is_refused_until_it_is_written_again(bucket, monkeypatch):
    def fail(files):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(buckets, 'upload', fail)
        with pytest.raises(KeyboardInterrupt), atomic_folder(bucket / 'out') as draft:
            write(draft, x='1')
    with pytest.raises(InputError, match='upload is unfinished'):
        input_path(bucket / 'out', '--checkpoint')
    with atomic_folder(bucket / 'out', replace=True) as draft:
        write(draft, x='2')
    assert (input_path(bucket / 'out', '--checkpoint') / 'x').read_text() == '2'


def test_a_bucket_that_does_not_exist_is_refused_before_work(bucket):
    check_writable(bucket / 'out')
    assert not names(bucket)
    with pytest.raises(InputError, match='there is no bucket not-made'):
        check_writable('gs://not-made/out')


def test_a_service_that_does_not_answer_is_named_soon(bucket, bucket_store, monkeypatch, caplog):
    async def never(*given, **options):
        await asyncio.sleep(60)

    monkeypatch.setattr(buckets, 'ANSWER_S', 0.2)
    monkeypatch.setattr(bucket_store, '_call', never)
    with pytest.raises(InputError, match='does not answer within 0 s; check the network'):
        check_writable(bucket / 'out')
    assert not caplog.records


# --- Copies on local disk ---------------------------------------------------------------------------------------------


def test_only_new_and_changed_files_of_the_needed_parts_are_copied(bucket, bucket_store, monkeypatch):
    fetched = []
    get_file = bucket_store.get_file
    monkeypatch.setattr(bucket_store, 'get_file', lambda name, *rest: fetched.append(name) or get_file(name, *rest))
    for name in ('root.json', 'unet/a', 'unet/b', 'vae/a'):
        (bucket / 'model' / name).write_text(name)
    folder = input_path(bucket / 'model', '--checkpoint', ['unet'])
    assert (folder / 'unet' / 'b').read_text() == 'unet/b' and not (folder / 'vae').exists()
    assert len(fetched) == 3
    (bucket / 'model' / 'unet' / 'a').write_text('UNET/A')
    again = input_path(bucket / 'model', '--checkpoint')
    assert again == folder and (folder / 'unet' / 'a').read_text() == 'UNET/A'
    assert sorted(fetched[3:]) == [f'{bucket.name}/model/{name}' for name in ('unet/a', 'vae/a')]


def test_parts_come_with_the_files_beside_them(bucket):
    names = (
        'run.json',
        'result/student.json',
        'result/unet/a',
        'result/unet/b/c',
        'result/unet_2/a',
        'best/student.json',
    )
    for name in names:
        (bucket / 'run' / name).write_text(name)
    folder = input_path(bucket / 'run', '--student', ['unet', 'result/unet'])
    copied = {str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()}
    assert copied == set(names[:4])


def test_only_the_upload_of_what_is_copied_must_be_finished(bucket):
    for name in ('result/unet/a', f'best/{buckets.INCOMPLETE}'):
        (bucket / 'run' / name).write_text('')
    assert (input_path(bucket / 'run', '--student', ['result/unet']) / 'result' / 'unet' / 'a').is_file()
    (bucket / 'run' / 'result' / buckets.INCOMPLETE).write_text('')
    for parts in (['result/unet'], None):
        with pytest.raises(InputError, match='upload is unfinished'):
            input_path(bucket / 'run', '--student', parts)


def test_an_interrupted_copy_keeps_its_complete_files(bucket, bucket_store, monkeypatch):
    for name in 'abc':
        (bucket / 'data' / name).write_text(name)
    get_file, fetched = bucket_store.get_file, []

    def get(name, local):
        fetched.append(name.rpartition('/')[2])
        if fetched.count('c') == 1 and name.endswith('/c'):
            pathlib.Path(local).write_text('par')
            raise OSError('connection lost')
        get_file(name, local)

    monkeypatch.setattr(bucket_store, 'get_file', get)
    with pytest.raises(OSError, match='connection lost'):
        input_path(bucket / 'data', 'data')
    folder = input_path(bucket / 'data', 'data')
    assert {path.name: path.read_text() for path in folder.iterdir()} == {name: name for name in 'abc'}
    assert sorted(fetched) == ['a', 'b', 'c', 'c']


def test_a_copy_larger_than_the_disk_is_refused(bucket, monkeypatch):
    (bucket / 'data' / 'a').write_text('abc')
    monkeypatch.setattr(buckets.shutil, 'disk_usage', lambda folder: _Usage(2))
    with pytest.raises(InputError, match='mount the bucket with Cloud Storage FUSE'):
        input_path(bucket / 'data', 'config.data')


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_a_missing_folder_is_refused(bucket):
    with pytest.raises(InputError, match=r'config.data gs://.*: no such file or folder'):
        input_path(bucket / 'data', 'config.data')


# --- Locks ------------------------------------------------------------------------------------------------------------


def test_one_process_at_a_time_has_the_lock(bucket):
    with folder_lock(bucket / 'run'):
        with (
            pytest.raises(InputError, match=f'process {os.getpid()} on .* is writing into it'),
            folder_lock(bucket / 'run'),
        ):
            pass
        with folder_lock(bucket / 'run', 'part'):
            pass
    with folder_lock(bucket / 'run'):
        pass
    assert not names(bucket / 'run')


@pytest.mark.parametrize(
    ('owner', 'age_s', 'taken'),
    [
        ({'host': 'another', 'pid': 1}, 0, False),
        ({'host': 'another', 'pid': 1}, bucket_lock.EXPIRES_S + 1, True),
        ({'host': os.uname().nodename, 'pid': 2**22 + 1}, 0, True),
    ],
    ids=['of another machine', 'expired', 'of a killed process of this machine'],
)
def test_the_lock_of_a_process_that_has_ended_is_taken_over(bucket, monkeypatch, owner, age_s, taken):
    (bucket / 'run' / '.lock').write_text(json.dumps(owner | {'started': 'then'}))
    now = time.time() + age_s
    monkeypatch.setattr(bucket_lock.time, 'time', lambda: now)
    monkeypatch.setattr('neodragon_jax.base.folder_lock.UNTIL_EXPIRED_S', 0.0)
    if taken:
        with folder_lock(bucket / 'run'):
            assert json.loads((bucket / 'run' / '.lock').read_text())['pid'] == str(os.getpid())
    else:
        with pytest.raises(InputError, match='expires after 90 s'), folder_lock(bucket / 'run'):
            pass


def test_of_two_processes_that_find_an_expired_lock_one_gets_it(bucket, monkeypatch):
    path = bucket / 'run' / '.lock'
    path.write_text(json.dumps({'host': 'another'}))
    first, second = (bucket_lock.BucketLock(os.fspath(path), {'life': life}) for life in 'ab')
    found = second._read()
    assert first.acquire(lambda owner: True) is None
    monkeypatch.setattr(second, '_read', lambda: found)
    assert second.acquire(lambda owner: True) is not None
    first.release()


def test_the_owner_renews_its_lock(bucket, monkeypatch):
    monkeypatch.setattr(bucket_lock, 'RENEW_S', 0.05)
    with folder_lock(bucket / 'run'):
        path, written = bucket / 'run' / '.lock', set()
        deadline = time.monotonic() + 10
        while len(written) < 3 and time.monotonic() < deadline:
            written.add(buckets.filesystem().info(os.fspath(path))['generation'])
        assert len(written) == 3


# --- Commands ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_in_a_bucket_is_read_by_its_folder_with_the_needed_parts_only(bucket):
    for part in ('context_adapter', 'causal_video_vae'):
        for path in (TINY_CHECKPOINT / part).iterdir():
            with atomic_file(bucket / 'model' / part / path.name) as draft:
                draft.write_bytes(path.read_bytes())
    given = str(bucket / 'model').replace('gs://', 'GS://')
    root = shipped.find(given, ['context_adapter'])
    assert sorted(path.name for path in root.iterdir()) == ['context_adapter']
    folder = checkpoint.component_folder(given, 'context_adapter')
    assert folder == root / 'context_adapter'
    _, params = checkpoint.load(bucket / 'model' / 'context_adapter')
    assert len(params) == len(checkpoint.load(TINY_CHECKPOINT / 'context_adapter')[1])


def test_a_component_in_a_bucket_has_the_fingerprint_of_its_copy_on_disk(bucket):
    for path in (TINY_CHECKPOINT / 'context_adapter').iterdir():
        with atomic_file(bucket / 'adapter' / path.name) as draft:
            draft.write_bytes(path.read_bytes())
    for identity in (fingerprint, sampled_fingerprint):
        for given in (bucket / 'adapter', str(bucket / 'adapter')):
            assert identity(given) == identity(TINY_CHECKPOINT / 'context_adapter')


def test_a_component_is_not_saved_into_a_local_folder_named_like_a_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, params = checkpoint.load(TINY_CHECKPOINT / 'context_adapter')
    with pytest.raises(InputError, match='gs://bucket/adapter'):
        checkpoint.save('gs://bucket/adapter', module, params)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('given', ['run', 'run/result'])
def test_a_student_of_a_run_in_a_bucket_has_its_record(bucket, given):
    for name in (f'{STUDENT}/config.json', f'{STUDENT_ADAPTER}/config.json', 'not_averaged/student.json'):
        (bucket / 'run' / 'result' / name).write_text('{}')
    record = {'student_steps': [2, 2, 1], 'student_first_steps': [3, 3, 3], 'spacing': 'even', 'protocol': '18'}
    (bucket / 'run' / 'result' / 'student.json').write_text(json.dumps(record))
    chosen = with_student(RELEASED, find_student(os.fspath(bucket / given), 'hybrid')).hybrid
    assert chosen.steps == (2, 2, 1) and chosen.first_steps == (3, 3, 3) and chosen.given_first_frame


def test_a_video_is_saved_into_a_bucket(bucket):
    frames = np.zeros((9, 32, 32, 3), np.uint8)
    saved = Video(frames=frames, prompt='x', seed=0).save(str(bucket / 'videos' / 'x.mp4'))
    assert saved == bucket / 'videos' / 'x.mp4' and len(saved.read_bytes()) > 500
