"""The evaluation inside runs of train.dmd on eight devices: low-rank student, best result, a run that it ends."""

from __future__ import annotations

import json

import jax
import pytest

from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.generation.student import find_student
from neodragon_jax.models import joint_block
from support.dmd_runs import settings
from support.glossary import unexplained
from support.training_runs import digests
from train.data.sources import hold_out
from train.dmd import program as dmd
from train.runtime.loop import run
from train.runtime.metrics import read_metrics
from train.runtime.program import DivergedError


@pytest.fixture(autouse=True)
def each_sample_has_its_own_prompt(monkeypatch):
    """Of the three prompts that the samples repeat, two held-out videos would leave too few."""
    monkeypatch.setattr(dmd, 'hold_out', lambda source, count, prompts, setting: hold_out(source, count, 0, setting))


def evaluated(samples, workdir, steps=2, **evaluation):
    """Return settings of a low-rank student that is evaluated every second step, on a mesh of 2 x 4."""
    config = settings(samples, workdir, steps, mesh=(2, 4, 1))
    config.dmd.update({'student_lora': {'rank': 2}, 'evaluation': {'videos': 2, **evaluation}})
    config.loop.update({'evaluate_every': 2, 'keep_best': 1, 'best_metric': 'eval/distance'})
    return config


def test_every_model_of_an_evaluation_sees_the_mesh(samples, tmp_path, monkeypatch):
    """Without the mesh, a TPU's attention kernel cannot be compiled for several devices."""
    seen, split = [], joint_block.keep_batch_split

    def watched(activations):
        seen.append(dict(jax.sharding.get_abstract_mesh().shape))
        return split(activations)

    training = dmd.load(dmd.RECIPE.read(evaluated(samples, tmp_path)))
    monkeypatch.setattr(joint_block, 'keep_batch_split', watched)
    run(*training)
    assert seen and all(sizes == {'data': 2, 'fsdp': 4, 'tensor': 1} for sizes in seen)
    result, best = tmp_path / 'result', tmp_path / 'best'
    told = digests(best)
    assert told.pop('best.json') and told == digests(result)  # of the only evaluation
    assert find_student(best, 'hybrid') == best
    checkpoint.load(best / folders.STUDENT)


def test_a_run_that_leaves_the_band_loses_nothing(samples, tmp_path):
    narrow = {'lowest': 1 - 1e-9, 'highest': 1 + 1e-9}
    for _ in range(2):  # also when it is repeated
        with pytest.raises(DivergedError, match=r'step 2: student over teacher outside.*evaluation\.stop to False'):
            dmd.RECIPE.run(evaluated(samples, tmp_path, steps=4, **narrow, stop=True, stop_after=0))
    videos = sorted(path.name for path in (tmp_path / 'samples' / 'step_000002').iterdir())
    assert videos == ['000.mp4', '000.png', '001.mp4', '001.png']
    (row,) = (row for row in read_metrics(tmp_path) if 'eval/outside_band' in row)
    assert not unexplained(row)
    assert row['step'] == 2 and row['eval/outside_band'] > 0 and row['eval/distance'] > 0
    assert [path.name for path in (tmp_path / 'checkpoints').iterdir() if path.name.isdigit()] == ['2']
    assert json.loads((tmp_path / 'best' / 'student.json').read_text())['iterations'] == 2
    before = digests(tmp_path / 'best')
    dmd.RECIPE.run(evaluated(samples, tmp_path, steps=2, **narrow))
    assert (tmp_path / 'result').is_dir() and digests(tmp_path / 'best') == before
