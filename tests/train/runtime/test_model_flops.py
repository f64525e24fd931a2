"""Model FLOPs, which the logged MFU divides: the same however a step saves memory, and never more than it executes."""

from __future__ import annotations

import importlib
from collections.abc import Hashable

import jax
import pytest

from support.goldens import TINY_CHECKPOINT
from train.runtime import flops, model_flops
from train.runtime.compiled_steps import CompiledSteps
from train.runtime.runner import Training, recipe_of
from train.runtime.sharding import MeshConfig, make_mesh
from train.runtime.step import abstract_arguments, jit_step, variants

# Settings that save memory, by program and preset.
SAVING = {
    'decoder:tiny': {'decoder': {'memory': {'blocks': True}}},
    'teacher:tiny': {'teacher': {'remat': 'full', 'accumulate': 2}},
    'pruning:stage2-tiny': {'flow': {'remat': 'kernel'}},
    'dmd:tiny-adversarial': {'dmd': {'remat': 'full', 'accumulate': 2}},
    'autoencoder:tiny': {'autoencoder': {'memory': {'blocks': True, 'window': 8}}},
}
QUICK = ('decoder:tiny', 'teacher:tiny')
CLIPS = {'frames': 9, 'height': 16, 'width': 16, 'held_out': 1}


def training(preset: str, changes: dict) -> Training:
    """Return a training as shapes."""
    name, _, preset = preset.partition(':')
    settings = importlib.import_module(f'configs.{name}').get_config(preset)
    settings.loop.batch_size = 4
    if 'clips' in settings:
        settings.clips.update(CLIPS)
    if name == 'dmd':
        settings.checkpoint = str(TINY_CHECKPOINT)
    settings.update(changes)
    return recipe_of(name).size(settings)


def steps_of(training: Training, monkeypatch) -> tuple[CompiledSteps, float, Hashable]:
    """Return the steps on one device, the FLOPs that the last variant executes, and that variant; nothing compiles."""
    monkeypatch.setattr(jax.stages.Lowered, 'compile', lambda self: None)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    arguments = abstract_arguments(training.program, training.program.frozen(), training.source, training.run, mesh)
    variant = list(variants(training.program))[-1]
    executed = flops.count(jit_step(training.program, variant, arguments).trace(*arguments).jaxpr).total
    return CompiledSteps(training.program, arguments, lambda line: None), executed, variant


@pytest.mark.parametrize(
    'preset', [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in SAVING]
)
def test_a_run_logs_the_same_arithmetic_however_it_saves_memory(preset, monkeypatch):
    plain, saving = training(preset, {}), training(preset, SAVING[preset])
    steps, executed, variant = steps_of(plain, monkeypatch)
    assert model_flops.plain(plain.program) is plain.program
    wanted = steps.step(variant).flops
    assert 0 < wanted <= executed
    steps, executed, variant = steps_of(saving, monkeypatch)
    assert model_flops.plain(saving.program) is not saving.program
    assert steps.step(variant).flops == pytest.approx(wanted, rel=1e-9)
    assert executed > 1.001 * wanted
