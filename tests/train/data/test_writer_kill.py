"""A writer killed at random times and at each of its steps leaves a dataset that another writer completes."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from support.goldens import ROOT
from train.data import ArraySpec, RecordSpec, SampleSource, SampleWriter, journal, shards

PROCESS = {'cwd': ROOT, 'env': os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests')])}}
COUNT, PER_SHARD, KILLS = 300, 16, 10
SPEC = RecordSpec(
    {'latents': ArraySpec((3, 8, 8, 16), 'bfloat16'), 'units': ArraySpec((), 'int32')},
    texts=('prompt',),
    blobs=('clip',),
)


def sample(index: int) -> dict:
    rng = np.random.default_rng(index)
    return {
        'index': index,
        'prompt': f'\u200fשלום №{index} 🐉',
        'clip': rng.bytes(index % 50) + b'\0',
        'latents': rng.normal(size=(3, 8, 8, 16)).astype(ml_dtypes.bfloat16),
        'units': index % 3 + 1,
    }


def write(folder: pathlib.Path, count: int, per_shard: int, pause_s: float = 0.0) -> None:
    """Write the missing samples, and record every sample when it is finished."""
    with (
        SampleWriter(folder / 'set', SPEC, count, protocol={}, samples_per_shard=per_shard) as writer,
        (folder / 'made.txt').open('a') as made,
    ):
        for index in writer.missing():
            time.sleep(pause_s)
            value = sample(index)
            print(index, file=made, flush=True)
            writer.append(value)


def assert_whole(folder: pathlib.Path, count: int) -> None:
    """Assert that the set has every sample once, whole, and nothing else is in its folder."""
    source = SampleSource(folder / 'set', verify=True)
    got = [source[index] for index in range(len(source))]
    assert [record['index'] for record in got] == list(range(count))
    for record in got:
        want = sample(record['index'])
        assert record.keys() == want.keys()
        assert all(np.array_equal(record[name], want[name]) for name in want)
    assert not [path.name for path in (folder / 'set').rglob('.*')]


@pytest.mark.long
def test_ten_kills_at_random_times(tmp_path):
    clock, made, kills = random.Random(7), tmp_path / 'made.txt', []
    made.touch()
    for _ in range(KILLS):
        goal = len(made.read_text().split()) + clock.randint(0, 25)
        with subprocess.Popen([sys.executable, __file__, str(tmp_path)], **PROCESS) as process:
            while len(made.read_text().split()) < goal and process.poll() is None:
                time.sleep(0.001)
            time.sleep(clock.uniform(0, 0.02))
            assert process.poll() is None, 'it ended before it was killed: make the test longer'
            process.kill()
        kills.append(len(made.read_text().split()))
    assert kills[-1] > 3 * PER_SHARD
    write(tmp_path, COUNT, PER_SHARD)
    assert_whole(tmp_path, COUNT)
    # Each kill lost only the sample that was being written.
    assert len(made.read_text().split()) <= COUNT + KILLS


def die_at(event: int) -> None:
    """Make this process kill itself just before its event-th file operation, or in the middle of it."""
    done = iter(range(10**6))

    def count_down() -> bool:
        return next(done) == event

    def deadly(function):
        def call(*args, **options):
            if count_down():
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    def torn_append(self, record: bytes) -> None:
        if count_down():
            self._file.write((journal.HEADER.pack(len(record), journal.checksum(record)) + record)[:-3])
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, record)

    append = journal.Journal.append
    journal.Journal.append = torn_append
    for owner, name in (
        (os, 'replace'),
        (os, 'fsync'),
        (os, 'mkdir'),
        (os, 'rmdir'),
        (os, 'unlink'),
        (journal.Journal, 'remove'),
        (shards, 'ArrayRecordWriter'),
    ):
        setattr(owner, name, deadly(getattr(owner, name)))


def kill_everywhere(folder: pathlib.Path) -> int:
    """Kill writers at every event in turn, each on a separate folder; complete the folders; return their number."""
    event = 0
    while True:
        place = folder / str(event)
        place.mkdir()
        child = os.fork()
        if child == 0:
            die_at(event)
            write(place, 5, 2)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return event
        write(place, 5, 2)
        event += 1


def test_a_kill_at_every_step(tmp_path):
    run = subprocess.run([sys.executable, __file__, str(tmp_path), 'everywhere'], capture_output=True, **PROCESS)
    assert run.returncode == 0, run.stderr.decode()
    killed = int(run.stdout)
    assert killed > 25  # 5 appends, and of each of 3 shards an ArrayRecord file, two renames, a hash and a removal
    write(tmp_path / str(killed), 5, 2)
    want = json.loads((tmp_path / str(killed) / 'set' / 'manifest.json').read_text())
    for event in range(killed):
        # Equal manifests: equal sizes and hashes of all shards.
        assert json.loads((tmp_path / str(event) / 'set' / 'manifest.json').read_text()) == want
        assert_whole(tmp_path / str(event), 5)
        made = [int(line) for line in (tmp_path / str(event) / 'made.txt').read_text().split()]
        assert sorted(set(made)) == list(range(5))
        assert len(made) <= 6


def test_two_writers_of_one_part_do_not_meet(tmp_path):
    first, second = (SampleWriter(tmp_path, SPEC, 4, protocol={}, samples_per_shard=4) for _ in range(2))
    first.append(sample(0))
    with pytest.raises(InputError, match='another process is writing it'):
        second.append(sample(0))
    first.close()
    with pytest.raises(InputError, match='another process has written part 0 meanwhile'):
        second.append(sample(0))
    assert SampleWriter(tmp_path, SPEC, 4, protocol={}, samples_per_shard=4).missing() == [1, 2, 3]


@pytest.mark.parametrize('where', [0, 8, -1])
def test_a_damaged_journal_keeps_what_is_before_the_damage(tmp_path, where):
    path = tmp_path / 'journal'
    records = [b'first', b'second' * 100, b'third']
    with journal.Journal(path) as open_journal:
        for record in records:
            open_journal.append(record)
    content = bytearray(path.read_bytes())
    last = len(content) - journal.HEADER.size - len(records[-1])
    content[last + where if where >= 0 else where] ^= 0x80
    path.write_bytes(content)
    with journal.Journal(path) as open_journal:
        assert (open_journal.count, list(open_journal)) == (2, records[:2])
        open_journal.append(b'again')
    assert journal.count_records(path) == 3


def teacher_command(folder: pathlib.Path) -> list[str]:
    (folder / 'prompts.txt').write_text('a dragon flies\na cat sleeps\na dog runs\n')
    given = [
        '--checkpoint',
        str(ROOT / 'tests' / 'goldens' / 'tiny_checkpoint'),
        '--prompts-file',
        str(folder / 'prompts.txt'),
        '--count',
        '41',
    ]
    given += ['--out', str(folder / 'set'), '--frames', '9', '--height', '64', '--width', '64', '--steps', *'222']
    given += ['--first-steps', *'222', '--first-frame', 'generated', '--samples-per-shard', '16']
    given += ['--dtype', 'float32', '--store-dtype', 'float32']
    return [sys.executable, '-m', 'train.teacher_samples', *given]


@pytest.mark.slow
def test_teacher_samples_killed_at_random_times(tmp_path):
    """The whole program on the miniature checkpoint: killed four times while it samples, it makes the same samples."""
    process = PROCESS | {'env': PROCESS['env'] | {'JAX_NUM_CPU_DEVICES': '1'}}
    (tmp_path / 'whole').mkdir()
    subprocess.run(teacher_command(tmp_path / 'whole'), check=True, **process)
    clock = random.Random(3)
    finished = lambda: (
        sum(journal.count_records(path) for path in (tmp_path / 'set').glob('.journal-*'))
        + 16 * len(list((tmp_path / 'set' / 'shards').glob('*.json')))
    )
    progress = [0]
    for _ in range(4):
        with subprocess.Popen(teacher_command(tmp_path), **process) as run:
            while finished() <= progress[-1] and run.poll() is None:
                time.sleep(0.005)
            time.sleep(clock.uniform(0, 0.1))
            assert run.poll() is None, 'it ended before it was killed: make it longer'
            run.kill()
        progress.append(finished())
    print('samples finished at each kill:', progress[1:])
    assert progress[-1] < 41
    subprocess.run(teacher_command(tmp_path), check=True, **process)
    got, want = SampleSource(tmp_path / 'set', verify=True), SampleSource(tmp_path / 'whole' / 'set')
    assert [got[index]['index'] for index in range(len(got))] == list(range(41))
    for index in range(41):
        assert got[index]['prompt'] == want[index]['prompt']
        for name in ('latents', 'text', 'pooled'):
            np.testing.assert_array_equal(got[index][name], want[index][name])


if __name__ == '__main__':
    if sys.argv[2:] == ['everywhere']:
        print(kill_everywhere(pathlib.Path(sys.argv[1])))
    else:
        write(pathlib.Path(sys.argv[1]), COUNT, PER_SHARD, pause_s=0.002)
