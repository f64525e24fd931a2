"""ContextAdapter: the MLP that maps text states to the denoiser's width, token by token.

Legend: D input width, E output width; any leading axes.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.neodragon import ContextAdapterConfig


def _linear(x: Array) -> Array:
    return x


def _gelu(x: Array) -> Array:
    # Looked up when called: exporters replace the function by one operation.
    return nn.gelu(x, approximate=False)


_ACTIVATIONS = {
    'gelu': _gelu,
    'silu': nn.silu,
    'relu': nn.relu,
    'tanh': nn.tanh,
    'linear': _linear,
}


class ContextAdapter(nn.Module):
    """MLP whose hidden layers may concatenate the network's input with their output.

    Source: Neodragon, section on text-encoder distillation.
    """

    config: ContextAdapterConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B E']:
        """Return the adapted states.

        Raises:
          InputError: the width of `x` is not `config.input_dims`.
        """
        c = self.config
        if x.shape[-1] != c.input_dims:
            raise InputError(
                f'text states are {x.shape[-1]} wide, the context adapter takes {c.input_dims}: '
                'use the text encoder and the adapter of one checkpoint.'
            )
        dense = functools.partial(
            nn.Dense, use_bias=c.use_biases, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype
        )
        activation = _ACTIVATIONS[c.activation_fn]
        y = x
        for i, (width, skip) in enumerate(zip(c.layer_depths, c.skips, strict=True)):
            layer = dense(width, name=f'layer_{i}')
            y = layer(activation(y)) if c.pre_activation else activation(layer(y))
            if skip:
                y = jnp.concatenate([x.astype(y.dtype), y], axis=-1)
        y = dense(c.output_dims, name=f'layer_{len(c.layer_depths)}')(y)
        return _ACTIVATIONS[c.out_activation_fn](y)
