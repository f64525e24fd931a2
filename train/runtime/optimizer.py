"""Optimizers: clipped AdamW or Muon with learning-rate schedules, the average of the parameters, and the state.

rate(n)    = learning_rate * n / warmup_steps                     while n < warmup_steps
           = learning_rate * decay(n)                             then, down to final_fraction at decay_steps
average(n) = average(n-1) + (1 - d) (params(n) - average(n-1)),   d = min(decay, (1 + n) / (10 + n)), n from 0
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Int

from neodragon_jax.base.errors import InputError
from train.runtime.settings import check_range

SCHEDULES = ('constant', 'cosine', 'linear')
KINDS = ('adamw', 'muon')
# Root mean square of Muon's updates, relative to the rate. It is close to AdamW's, so that both use the same rates
# (Kimi team, arXiv 2502.16982, section 2.2).
MUON_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Options of an optimizer and its learning-rate schedule.

    All defaults except the rate are those of Pyramid-Flow (arXiv 2410.05954).

    Attributes:
      learning_rate: the rate after the warm-up.
      betas: decays of the two moments.
      epsilon: added to the root of the second moment.
      weight_decay: decoupled decay, per update and unit of the rate.
      kind: 'adamw' or 'muon', which orthogonalizes the updates of matrices (Jordan et al., 2024; optax.contrib.muon)
        and updates the other parameters by AdamW with Nesterov momentum.
      warmup_steps: updates of the linear warm-up from 0.
      clip_norm: limit of the gradient's global norm.
      schedule: of the rate after the warm-up: 'constant', 'cosine' or 'linear'.
      decay_steps: update at which a decaying rate reaches its final value, warm-up included.
      final_fraction: final value of a decaying rate, as a fraction of the learning rate.
    """

    learning_rate: float = 1e-6
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    schedule: str = 'constant'
    decay_steps: int = 0
    final_fraction: float = 0.0
    kind: str = 'adamw'

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f'kind is {self.kind!r}; use one of {", ".join(KINDS)}.')
        if self.schedule not in SCHEDULES:
            raise InputError(f'schedule is {self.schedule!r}; use one of {", ".join(SCHEDULES)}.')
        check_range(self, 'learning_rate', 'warmup_steps', 'decay_steps', 'weight_decay', least=0)
        check_range(self, 'epsilon', 'clip_norm', above=0)
        check_range(self, 'betas', least=0, below=1)
        check_range(self, 'final_fraction', least=0, most=1)
        if len(self.betas) != 2:
            raise InputError(f'betas is {self.betas}; give two numbers.')
        falls, end = self.schedule != 'constant', self.decay_steps
        if falls and end <= self.warmup_steps:
            raise InputError(
                f'decay_steps is {end}, but schedule is {self.schedule!r} and warmup_steps is '
                f'{self.warmup_steps}; set the update at which the rate ends, after the warm-up.'
            )
        if not falls and end:
            raise InputError(f'decay_steps is {end}, but schedule is constant; use cosine or linear, or 0.')


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Return the rate as a function of the number of previous updates."""
    rate, warmup = config.learning_rate, config.warmup_steps
    span = config.decay_steps - warmup
    if config.schedule == 'cosine':
        after = optax.cosine_decay_schedule(rate, span, alpha=config.final_fraction)
    elif config.schedule == 'linear':
        after = optax.linear_schedule(rate, rate * config.final_fraction, span)
    elif warmup:
        # The rate stays at its last value.
        return optax.linear_schedule(0.0, rate, warmup)
    else:
        return optax.constant_schedule(rate)
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after], [warmup]) if warmup else after


def make_optimizer(
    config: OptimizerConfig, fixed: Collection[str] = ('positions',)
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of a tree of parameters; its `fixed` top-level entries get neither updates nor moments.

    The default is for a denoiser, whose positional table is constant.
    """
    trained = optax.chain(optax.clip_by_global_norm(config.clip_norm), _inner(config))
    return optax.partition(
        {'trained': trained, 'fixed': optax.set_to_zero()},
        lambda params: {name: 'fixed' if name in fixed else 'trained' for name in params},
    )


def _inner(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return the transformation that follows the clipping."""
    rate = learning_rate(config)
    if config.kind == 'adamw':
        return optax.adamw(rate, *config.betas, eps=config.epsilon, weight_decay=config.weight_decay)
    return optax.contrib.muon(
        rate,
        weight_decay=config.weight_decay,
        adam_b1=config.betas[0],
        adam_b2=config.betas[1],
        eps=config.epsilon,
        adam_weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=MUON_RMS,
    )


def _matrices(params: Any) -> Any:
    """Return the matrix axes of every leaf, or None for a leaf that is not a matrix.

    Kernels are [in, out], or [blocks, in, out] where blocks are stacked for a scan.
    """

    def axes(path: Any, leaf: Any) -> Any:
        if getattr(path[-1], 'key', None) != 'kernel' or leaf.ndim not in (2, 3):
            return None
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """Options of an exponential moving average of parameters.

    Attributes:
      decay: weight of the previous average in an update.
      warmup: limit the first decays to (1 + n) / (10 + n), so that the weight of the initial parameters decays quickly.
    """

    decay: float = 0.999
    warmup: bool = True

    def __post_init__(self) -> None:
        check_range(self, 'decay', least=0, below=1)


@flax.struct.dataclass
class Ema:
    """An average of parameters, sharded and saved like them."""

    params: Any
    updates: Int[Array, '']


def init_ema(params: Any) -> Ema:
    """Return an average that begins at a copy of the parameters: a donated state must not contain a buffer twice."""
    return Ema(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))


def update_ema(ema: Ema, params: Any, config: EmaConfig) -> Ema:
    """Return the average after an update of the parameters. Unchanged parameters keep their average bit for bit."""
    decay: Any = config.decay
    if config.warmup:
        decay = jnp.minimum(decay, (1 + ema.updates) / (10 + ema.updates))
    moved = optax.tree.add_scale(ema.params, 1 - decay, optax.tree.sub(params, ema.params))
    return Ema(jax.tree.map(lambda new, old: new.astype(old.dtype), moved, ema.params), ema.updates + 1)


@flax.struct.dataclass
class AveragedState:
    """The state of a program: float32 parameters, optimizer state, and the average or None."""

    step: Array
    params: Any
    opt: Any
    ema: Ema | None

    @classmethod
    def begin(cls, params: Any, tx: optax.GradientTransformation, ema_decay: float) -> AveragedState:
        """Return the state before the first step.

        Args:
          ema_decay: decay of the average; 0 for no average.
        """
        average = init_ema(params) if ema_decay else None
        return cls(step=jnp.zeros((), jnp.int32), params=params, opt=tx.init(params), ema=average)

    @property
    def result(self) -> Any:
        """Return the parameters to evaluate and save: the average if there is one."""
        return self.params if self.ema is None else self.ema.params

    def updated(self, grads: Any, tx: optax.GradientTransformation, ema_decay: float) -> AveragedState:
        """Return the state after an update by a gradient."""
        changes, opt = tx.update(grads, self.opt, self.params)
        params = optax.apply_updates(self.params, changes)
        ema = None if self.ema is None else update_ema(self.ema, params, EmaConfig(ema_decay))
        return self.replace(params=params, opt=opt, ema=ema)  # pyright: ignore[reportAttributeAccessIssue]


def masters(params: Any) -> Any:
    """Return copies of the parameters in float32; copies are needed because a state's buffers are donated."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)


def optimizer_kinds(program: object) -> dict[str, str]:
    """Return the kind of each optimizer in the settings of a program, `program.config`; their states differ."""
    config = getattr(program, 'config', None)
    fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    values = {field.name: getattr(config, field.name) for field in fields}
    return {name: value.kind for name, value in values.items() if isinstance(value, OptimizerConfig)}
