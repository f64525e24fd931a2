"""Metrics of the step distillation, over a batch and by unit and stage.

Legend: B batch, T latent frames (= units).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from train.flow import flow_matching

# Values with this ending are logged as the root of their mean, ending in RMS.
SQUARE, RMS = '_square', '_rms'

Sums = dict[str, Float[Array, '2 T']]


def unit_sums(values: Mapping[str, Float[Array, ' B']], unit: Int[Array, ' B'], frames: int) -> Sums:
    """Return, for each kind of value, the sums over the examples at every unit, and their number."""
    return {name: flow_matching.unit_sums(value, unit, frames) for name, value in values.items()}


def means(sums: Mapping[str, Float[Array, '2 T']], stage: int, first_unit: int) -> dict[str, Array]:
    """Return NAME, the mean over all examples, and NAME/stage{s}/unit{u}, NaN where no example has the unit.

    Args:
      first_unit: the first unit that has examples.
    """
    metrics = {name: jnp.sum(pair[0]) / jnp.sum(pair[1]) for name, pair in sums.items()}
    for name, pair in sums.items():
        units = flow_matching.unit_means(pair, f'{name}/stage{stage}')
        metrics |= dict(list(units.items())[first_unit:])
    roots = {name.replace(SQUARE, RMS): jnp.sqrt(value) for name, value in metrics.items() if SQUARE in name}
    return {name: value for name, value in metrics.items() if SQUARE not in name} | roots


def norm(x: Float[Array, 'B ...']) -> Float[Array, ' B']:
    """Return the Euclidean norm of every sample."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))))


def cosine(x: Float[Array, 'B ...'], y: Float[Array, 'B ...']) -> Float[Array, ' B']:
    """Return the cosine of two tensors for every sample; 0 where one of them vanishes."""
    product = jnp.sum(x * y, axis=tuple(range(1, x.ndim)))
    return product / jnp.maximum(norm(x) * norm(y), jnp.finfo(jnp.float32).tiny)


def gradient_metrics(name: str, grad_norm: Float[Array, ''], clip_norm: float) -> dict[str, Array]:
    """Return NAME_grad_norm, and NAME_clipped: 1 where clipping shortens the gradient, so that its mean is a share."""
    return {f'{name}_grad_norm': grad_norm, f'{name}_clipped': (grad_norm > clip_norm).astype(jnp.float32)}
