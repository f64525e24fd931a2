"""The optimizer of denoisers: clipped AdamW that leaves fixed tables alone."""

from __future__ import annotations

import dataclasses

import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW at a constant rate after a linear warm-up; Pyramid-Flow's recipe (arXiv 2410.05954) but for the rate.

    Attributes:
      warmup_steps: updates until the rate is reached.
      clip_norm: limit of the gradient's global norm.
    """

    learning_rate: float = 1e-6
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    clip_norm: float = 1.0


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return clipped AdamW for a denoiser's parameters; its fixed positional table gets neither updates nor moments."""
    if config.warmup_steps:
        rate = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    else:
        rate = optax.constant_schedule(config.learning_rate)
    trained = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(rate, *config.betas, eps=config.epsilon, weight_decay=config.weight_decay),
    )
    return optax.partition(
        {'trained': trained, 'fixed': optax.set_to_zero()},
        lambda params: {name: 'fixed' if name == 'positions' else 'trained' for name in params},
    )
