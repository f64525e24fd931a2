"""Checkpoints that cannot be read: only those whose files are missing or changed may be deleted."""

from __future__ import annotations

import errno
import pathlib
import shutil

import jax
import orbax.checkpoint as ocp
import pytest

from neodragon_jax.base.errors import InputError
from support.toy_program import LinearSource, WithEvaluations, config_for
from train.runtime.damage import is_damage, raise_unless_damaged
from train.runtime.loop import run
from train.runtime.sharding import MeshConfig

SMALL = {'mesh': MeshConfig(1, 1, 1), 'log_every': 100, 'checkpoint_every': 1}
BEST = {'evaluate_every': 1, 'keep_best': 1, 'best_metric': 'eval/distance'}


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


WHOLE = {
    'memory of the devices': jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes'),
    'memory of the host': MemoryError('Unable to allocate 9 GiB'),
    'bucket busy': ValueError('UNAVAILABLE: Error reading "gs://b/7/state/d/1": HTTP response code: 503'),
    'bucket slow': ValueError('DEADLINE_EXCEEDED: Error reading "gs://b/7"'),
    'bucket closed': ValueError('PERMISSION_DENIED: HTTP response code: 403'),
    'network': ConnectionResetError(errno.ECONNRESET, 'Connection reset by peer'),
    'permission': PermissionError(errno.EACCES, 'Permission denied', '/run/7'),
    'disk': OSError(errno.EIO, 'Input/output error'),
    'wrapped': caused(ValueError('Failed to restore.'), TimeoutError(errno.ETIMEDOUT, 'timed out')),
    'group': ExceptionGroup('2 failed', [KeyError('a'), ValueError('UNAVAILABLE: 503')]),
}
BROKEN = {
    'hash': ValueError('its hash is another'),
    'checksum': ValueError('DATA_LOSS: Digest mismatch'),
    'code': jax.errors.JaxRuntimeError('DATA_LOSS: unexpected end of file'),
    'file': FileNotFoundError(errno.ENOENT, 'No such file'),
    'item': KeyError('metadata'),
}


@pytest.mark.parametrize('name', WHOLE)
def test_what_is_no_damage_keeps_the_checkpoint(name):
    with pytest.raises(InputError, match=r'run/7: the checkpoint cannot be read now .* Keep it') as caught:
        raise_unless_damaged(pathlib.Path('run/7'), WHOLE[name])
    assert 'delete' not in str(caught.value)


@pytest.mark.parametrize('name', BROKEN)
def test_damage_is_damage(name):
    assert is_damage(BROKEN[name])
    raise_unless_damaged(pathlib.Path('run/7'), BROKEN[name])


def test_another_error_keeps_its_traceback():
    error = RuntimeError('a mistake of the program')
    with pytest.raises(RuntimeError) as caught:
        raise_unless_damaged(pathlib.Path('run/7'), error)
    assert caught.value is error


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> pathlib.Path:
    """A run of three steps whose best is the second."""
    folder = tmp_path_factory.mktemp('run')
    run(WithEvaluations(scores={1: 3.0, 2: 1.0, 3: 2.0}), LinearSource(), config_for(folder, steps=3, **SMALL, **BEST))
    return folder


@pytest.mark.parametrize(
    ('handler', 'lost', 'step'),
    [
        (ocp.JsonCheckpointHandler, None, 3),
        (ocp.StandardCheckpointHandler, None, 3),
        (ocp.StandardCheckpointHandler, 'best', 2),
    ],
    ids=['metadata', 'state', 'best state'],
)
def test_a_run_that_cannot_read_its_checkpoint_now_names_the_remedy(
    trained, tmp_path, monkeypatch, handler, lost, step
):
    shutil.copytree(trained, tmp_path / 'run')
    if lost:
        shutil.rmtree(tmp_path / 'run' / lost)

    real = handler.restore

    def full(self, directory, *args, **kwargs):
        if directory.name == 'metrics':  # which Orbax reads for itself
            return real(self, directory, *args, **kwargs)
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')

    monkeypatch.setattr(handler, 'restore', full)
    with pytest.raises(InputError, match=rf'checkpoints/{step}: the checkpoint cannot be read now .* more devices'):
        run(WithEvaluations(), LinearSource(), config_for(tmp_path / 'run', steps=4, **SMALL, **BEST))


def test_a_checkpoint_that_cannot_be_read_now_is_not_named_for_deletion(trained, tmp_path, monkeypatch):
    """The search for the newest good checkpoint meets the same devices and the same network."""
    shutil.copytree(trained, tmp_path / 'run')
    real = ocp.StandardCheckpointHandler.restore

    def restore(self, directory, *args, **kwargs):
        if '/2/' in str(directory):
            raise ValueError('UNAVAILABLE: 503')
        if '/3/' in str(directory):
            raise ValueError('DATA_LOSS: Digest mismatch')
        return real(self, directory, *args, **kwargs)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, 'restore', restore)
    with pytest.raises(InputError, match=r'checkpoints/3: the checkpoint is damaged .*/3 to continue from step 2\.'):
        run(WithEvaluations(), LinearSource(), config_for(tmp_path / 'run', steps=4, **SMALL, **BEST))
