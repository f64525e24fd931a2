"""Hooks of the loop (evaluations, best checkpoints, traces, the compile cache) and its settings."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from neodragon_jax.base.errors import InputError
from support import goldens
from support.toy_program import LinearSource, Toy, WithEvaluations, checkpoint_steps, config_for, traces
from train.runtime.evaluator import Evaluator
from train.runtime.loop import LoopConfig, run
from train.runtime.metrics import read_metrics
from train.runtime.program import DivergedError
from train.runtime.settings import defaults, freeze
from train.runtime.sharding import MeshConfig


def best_steps(folder) -> list[int]:
    return [row['step'] for row in json.loads((folder / 'best.json').read_text())['best_first']]


def test_evaluations_write_samples_and_are_logged(tmp_path, capsys):
    state = run(WithEvaluations(), LinearSource(), config_for(tmp_path, steps=8, evaluate_every=3))
    rows = {row['step']: row for row in read_metrics(tmp_path)}
    assert [step for step, row in rows.items() if 'eval/distance' in row] == [3, 6, 8]
    assert [step for step, row in rows.items() if 'loss' in row] == [4, 8]
    assert sorted(path.name for path in (tmp_path / 'samples').iterdir()) == [
        'step_000003',
        'step_000006',
        'step_000008',
    ]
    bias = np.load(tmp_path / 'samples' / 'step_000008' / 'bias.npy')
    np.testing.assert_array_equal(bias, np.asarray(state.student['image_mlp']['linear_2']['bias']))
    assert rows[8]['eval/distance'] == pytest.approx(np.linalg.norm(bias), rel=1e-6)
    assert f'step 8  eval/distance {rows[8]["eval/distance"]:.4g}\n' in capsys.readouterr().out
    # No empty folders, and no evaluations unless requested.
    run(WithEvaluations(silent=True), LinearSource(), config_for(tmp_path / 'silent', steps=1, evaluate_every=1))
    assert not any((tmp_path / 'silent' / 'samples').iterdir())
    run(WithEvaluations(), LinearSource(), config_for(tmp_path / 'never', steps=1))
    assert not (tmp_path / 'never' / 'samples').exists()


@pytest.mark.parametrize(('mode', 'best'), [('min', [4, 2]), ('max', [1, 6])])
def test_newest_and_best_checkpoints_stay(tmp_path, mode, best):
    program = WithEvaluations(scores={1: 5.0, 2: 1.0, 3: 4.0, 4: 0.5, 5: float('nan'), 6: 4.5, 7: 4.0, 8: 4.0})
    settings = {'evaluate_every': 1, 'keep_best': 2, 'best_metric': 'eval/distance', 'best_mode': mode, 'keep': 2}
    run(program, LinearSource(), config_for(tmp_path, steps=5, **settings))
    run(program, LinearSource(), config_for(tmp_path, steps=8, **settings))
    assert checkpoint_steps(tmp_path) == sorted({*best, 7, 8})
    assert best_steps(tmp_path) == best
    assert json.loads((tmp_path / 'best.json').read_text())['best_first'][0]['eval/distance'] == program.scores[best[0]]
    assert read_metrics(tmp_path)[4]['eval/distance'] is None
    assert (tmp_path / 'best' / 'step.txt').read_text() == str(best[0])


def test_an_evaluation_that_ends_the_run_keeps_samples_metrics_and_checkpoint(tmp_path):
    class Diverging(WithEvaluations):
        def evaluate(self, state, frozen, folder):
            metrics = super().evaluate(state, frozen, folder)
            raise DivergedError('the picture is black.', metrics)

    with pytest.raises(DivergedError, match='black'):
        run(Diverging(), LinearSource(), config_for(tmp_path, steps=8, evaluate_every=3))
    assert [path.name for path in (tmp_path / 'samples' / 'step_000003').iterdir()] == ['bias.npy']
    assert 'eval/distance' in read_metrics(tmp_path)[-1] and checkpoint_steps(tmp_path) == [3]


@pytest.mark.parametrize('number', [np.float32(0.5), np.int64(2), float('nan')], ids=str)
@pytest.mark.parametrize('diverged', [False, True])
def test_metrics_of_any_type_reach_all_processes(tmp_path, monkeypatch, number, diverged):
    class Numbers(WithEvaluations):
        def evaluate(self, state, frozen, folder):
            if diverged:
                raise DivergedError('the picture is black.', {'distance': number})
            return {'distance': number}

    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr('train.runtime.processes.multihost_utils.broadcast_one_to_all', lambda value: value)
    evaluator = Evaluator(Numbers(), config_for(tmp_path, steps=1, evaluate_every=1))
    scores = evaluator.run(None, None, 1)
    assert scores == pytest.approx({'eval/distance': float(number)}, nan_ok=True)
    assert bool(evaluator.failure) == diverged


def test_evaluation_that_killed_processes_left_is_cleared_away(tmp_path):
    abandoned = tmp_path / 'samples' / '.step_000002.0123456789ab'
    abandoned.mkdir(parents=True)
    (tmp_path / 'samples' / 'step_000002').mkdir()
    (tmp_path / 'samples' / 'step_000002' / 'older.npy').touch()
    run(WithEvaluations(), LinearSource(), config_for(tmp_path, steps=2, evaluate_every=2))
    assert [path.name for path in (tmp_path / 'samples').iterdir()] == ['step_000002']
    assert [path.name for path in (tmp_path / 'samples' / 'step_000002').iterdir()] == ['bias.npy']


def test_evaluations_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(InputError, match='evaluate_every is 2, but program toy has no evaluation; set it to 0'):
        run(Toy(), LinearSource(), config_for(tmp_path, evaluate_every=2))
    keep = {'keep_best': 1, 'evaluate_every': 1, 'steps': 1}
    with pytest.raises(InputError, match=r'eval/distanse.*Did you mean "eval/distance"'):
        run(WithEvaluations(), LinearSource(), config_for(tmp_path, best_metric='eval/distanse', **keep))
    assert checkpoint_steps(tmp_path) == [1]  # no step is lost
    with pytest.raises(InputError, match="best_metric is 'loss', but keep_best is 1"):
        config_for(tmp_path, best_metric='loss', **keep)
    with pytest.raises(InputError, match='keep_best is 1, but evaluate_every is 0'):
        config_for(tmp_path, best_metric='eval/loss', keep_best=1)
    with pytest.raises(InputError, match="best_mode is 'least'; use min or max"):
        config_for(tmp_path, best_mode='least')


def test_steps_named_in_advance_are_traced(tmp_path, capsys):
    run(Toy(), LinearSource(), config_for(tmp_path, steps=5, profile_steps=(3, 4)))
    assert traces(tmp_path) == ['steps-3-4']
    assert [path.name for path in (tmp_path / 'profile').iterdir()] == ['steps-3-4']
    assert f'profile of steps 3 to 4: {tmp_path}/profile/steps-3-4\n' in capsys.readouterr().out
    with pytest.raises(InputError, match=r'profile_steps is \(4, 3\); give the first and the last step'):
        config_for(tmp_path, profile_steps=(4, 3))


def test_compiled_programs_are_kept_where_asked(tmp_path):
    """In a separate process, because the cache folder applies to everything that a process compiles afterwards."""
    code = (
        'import sys, pathlib, jax, jax.numpy as jnp; from train.runtime.compiled_steps import use_compile_cache\n'
        'run = pathlib.Path("run"); use_compile_cache("", run)\n'
        'assert jax.config.values["jax_compilation_cache_dir"] == sys.argv[1]\n'
        'jax.jit(lambda x: x + 1)(jnp.ones(3))\n'
        'use_compile_cache(sys.argv[2], run); jax.jit(lambda x: x - 1)(jnp.ones(3))'
    )
    first, second = tmp_path / 'first', tmp_path / 'second'
    variables = {'JAX_COMPILATION_CACHE_DIR': str(first), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    command = [sys.executable, '-c', code, str(first), str(second)]
    subprocess.run(command, env=os.environ | variables, cwd=goldens.GOLDENS.parents[1], check=True, timeout=120)
    assert any('lambda' in path.name for path in first.iterdir())
    assert any('lambda' in path.name for path in second.iterdir())


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_settings_show_every_default():
    shown = defaults(LoopConfig, steps=5, batch_size=8, mesh={'fsdp': -1, 'data': 1})
    fields = {field.name for field in dataclasses.fields(LoopConfig)}
    assert shown.keys() == fields - {'workdir', 'seed', 'updates'}
    assert shown['mesh'] == {'data': 1, 'fsdp': -1, 'tensor': 1}
    want = LoopConfig(workdir='x', steps=5, batch_size=8, mesh=MeshConfig(data=1, fsdp=-1))
    assert freeze(LoopConfig, ConfigDict(shown).to_dict() | {'workdir': 'x'}) == want
    with pytest.raises(InputError, match=r'LoopConfig\.stepz: no such setting. Did you mean "steps"'):
        defaults(LoopConfig, 'workdir', stepz=5)
    with pytest.raises(InputError, match=r'LoopConfig\.steps has no default'):
        defaults(LoopConfig)
