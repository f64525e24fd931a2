"""A toy program for the training loop: a two-layer network learns a linear map."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.runtime.loop import LoopConfig
from train.runtime.sharding import MeshConfig, split_batch, to_host

WIDTH, HIDDEN, SAMPLES = 16, 32, 40


OPTIMIZER = optax.adam(1e-2)


class LinearSource:
    """Pairs (x, A x) with a name, as a teacher's samples have a prompt."""

    def __init__(self, count: int = SAMPLES) -> None:
        rng = np.random.default_rng(7)
        self._x = rng.normal(size=(count, WIDTH)).astype(np.float32)
        self._y = self._x @ (rng.normal(size=(WIDTH, WIDTH)) / 4).astype(np.float32)

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        return {'x': self._x[index], 'y': self._y[index], 'index': np.int64(index), 'prompt': f'sample {index}'}


@flax.struct.dataclass
class ToyState:
    step: Any
    student: Any
    fake: Any
    optimizer: Any
    seen: Any


@dataclasses.dataclass
class Toy:
    """Even steps fit the data, odd ones see noisy inputs; `seen` is a hash of the data in their order."""

    poison: tuple[int, ...] = ()
    stop_before: int = -1
    flavor: str = 'plain'
    seconds_per_step: float = 0.0
    name: str = 'toy'

    def frozen(self) -> Any:
        rng = np.random.default_rng(1)
        kernel = lambda *shape: (rng.normal(size=shape) / 4).astype(np.float32)
        first = {'kernel': kernel(WIDTH, HIDDEN), 'bias': np.zeros(HIDDEN, np.float32)}
        second = {'kernel': kernel(HIDDEN, WIDTH), 'bias': np.zeros(WIDTH, np.float32)}
        return {'teacher': {'image_mlp': {'linear_1': first, 'linear_2': second}}}

    def init_state(self, key, frozen):
        teacher = frozen['teacher']
        noisy = jax.tree.map(lambda leaf: leaf + 0.01 * jax.random.normal(key, leaf.shape), teacher)
        scalar = jnp.zeros((), jnp.int32)
        return ToyState(step=scalar, student=teacher, fake=noisy, optimizer=OPTIMIZER.init(teacher), seen=scalar)

    def variant(self, step):
        time.sleep(self.seconds_per_step)
        if step == self.stop_before:
            raise KeyboardInterrupt
        return step % 2

    def train_step(self, variant, state, frozen, batch, key):
        noise = 0.1 * variant * jax.random.normal(key, batch['x'].shape)

        def loss_of(params):
            hidden = jnp.tanh(_linear(params['image_mlp']['linear_1'], batch['x'] + noise))
            hidden = split_batch(hidden, axis=hidden.ndim - 2)
            return jnp.square(_linear(params['image_mlp']['linear_2'], hidden) - batch['y']).mean()

        loss, gradient = jax.value_and_grad(loss_of)(state.student)
        poisoned = jnp.isin(state.step, jnp.asarray((*self.poison, -1)))
        loss = jnp.where(poisoned, jnp.nan, loss)
        updates, optimizer = OPTIMIZER.update(gradient, state.optimizer)
        student = optax.apply_updates(state.student, updates)
        places = jnp.arange(batch['index'].size, dtype=jnp.int32).reshape(batch['index'].shape)
        seen = state.seen * 31 + jnp.sum(batch['index'] * (2 * places + 1))
        metrics = {'loss': loss, 'grad_norm': optax.global_norm(gradient), f'loss_of_variant_{variant}': loss}
        distance = {'distance': optax.global_norm(jax.tree.map(jnp.subtract, student, frozen['teacher']))}
        return state.replace(student=student, optimizer=optimizer, seen=seen), metrics | distance

    def finish(self, state, folder):
        bias, step = to_host((state.student['image_mlp']['linear_2']['bias'], state.step))
        if jax.process_index() == 0:
            np.save(folder / 'bias.npy', bias)
            (folder / 'step.txt').write_text(str(int(step)))

    def metadata(self):
        return {'flavor': self.flavor}


@dataclasses.dataclass
class WithEvaluations(Toy):
    """A toy with given evaluations by step; without them, the evaluation is the distance covered by the bias."""

    scores: dict[int, float] = dataclasses.field(default_factory=dict)
    silent: bool = False

    def evaluate(self, state, frozen, folder):
        bias = [to_host(tree['image_mlp']['linear_2']['bias']) for tree in (state.student, frozen['teacher'])]
        if not self.silent:
            np.save(folder / 'bias.npy', bias[0])
        return {'distance': self.scores.get(int(state.step), float(np.linalg.norm(bias[0] - bias[1])))}


def _linear(layer, x):
    return x @ layer['kernel'] + layer['bias']


def config_for(workdir, **changes) -> LoopConfig:
    defaults = {'steps': 12, 'batch_size': 8, 'checkpoint_every': 5, 'log_every': 4, 'mesh': MeshConfig(2, 2, 2)}
    return LoopConfig(workdir=str(workdir), **defaults | changes)


def checkpoint_steps(workdir) -> list[int]:
    return sorted(int(path.name) for path in (pathlib.Path(workdir) / 'checkpoints').iterdir() if path.name.isdigit())


def traces(folder) -> list[str]:
    """Return the names of the complete traces in a run's folder."""
    return [path.parents[3].name for path in pathlib.Path(folder).glob('profile/[!.]*/plugins/profile/*/*.xplane.pb')]
