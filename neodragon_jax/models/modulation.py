"""Conditioning of the denoiser: one vector from timestep and prompt, and from it the AdaLN vectors of every block.

The linears here hold a third of the model's parameters and run once per timestep, not once per token: a phone computes
them outside the denoiser graph, once per stage.

Legend: B batch, D width, p width of the pooled prompt or of the timestep's sinusoid.
Source: arXiv 2212.09748 (AdaLN-zero); arXiv 2403.03206 (SD3) for the two streams.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from neodragon_jax.models.layers import layer_norm
from neodragon_jax.models.mesh import keep_batch_split, split_inputs

_SMALL = nn.initializers.normal(0.02)
_ZEROS = nn.initializers.zeros_init()

# Precision of the matrix products that promise float32: a TPU computes them from bfloat16 parts by default.
EXACT = jax.lax.Precision.HIGHEST

# Offsets of the released vectors, in their order: a gain is 1 + the released scale.
SIX_PARTS = (0.0, 1.0, 0.0, 0.0, 1.0, 0.0)  # shift, scale, gate for attention, then for the MLP
TWO_PARTS = (1.0, 0.0)  # scale, shift: the order of the output norms


class Modulation(NamedTuple):
    """AdaLN vectors of one token stream of one block, each [B, 1, D]; a gain is 1 + the released scale."""

    shift_attention: Array
    gain_attention: Array
    gate_attention: Array
    shift_mlp: Array
    gain_mlp: Array
    gate_mlp: Array


class FinalModulation(NamedTuple):
    """AdaLN vectors of an output norm (no gate), each [B, 1, D]."""

    gain: Array
    shift: Array


class BlockModulation(NamedTuple):
    """AdaLN vectors of one block; the last block's text stream only feeds attention."""

    image: Modulation
    text: Modulation | FinalModulation


class ConditioningMLP(nn.Module):
    """Linear, SiLU, linear: embeds the timestep or the pooled prompt, [B, *] -> [B, D], in float32."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, 'B p']) -> Float[Array, 'B D']:
        dense = functools.partial(nn.Dense, self.width, dtype=jnp.float32, precision=EXACT, kernel_init=_SMALL)
        return dense(name='linear_2')(nn.silu(dense(name='linear_1')(x)))


class OffsetLinear(nn.Module):
    """Linear to several vectors of the input's width, in float32; offsets are folded into the bias at no cost."""

    offsets: tuple[float, ...]

    @nn.compact
    def __call__(self, x: Float[Array, 'B D']) -> Float[Array, 'B parts D']:
        parts, width = len(self.offsets), x.shape[-1]
        kernel = self.param('kernel', _ZEROS, (width, parts, width))
        bias = self.param('bias', _ZEROS, (parts, width)) + np.array(self.offsets, np.float32)[:, None]
        # Flax's layer rather than its formula: exporters turn it into one native node.
        params = {'kernel': kernel.reshape(width, -1), 'bias': bias.reshape(-1)}
        dense = nn.Dense(parts * width, dtype=jnp.float32, precision=EXACT, parent=None)
        flat: Any = dense.apply({'params': params}, split_inputs(x))
        return keep_batch_split(flat.reshape(-1, parts, width))


class ModulationLinear(nn.Module):
    """Linear from the activated conditioning to one vector per offset."""

    offsets: tuple[float, ...]

    @nn.compact
    def __call__(self, x: Float[Array, 'B D']) -> list[Float[Array, 'B 1 D']]:
        return list(jnp.split(OffsetLinear(self.offsets, name='linear')(x), len(self.offsets), axis=1))


class BlockModulator(nn.Module):
    """All AdaLN vectors of one block from the conditioning, [B, D] -> BlockModulation."""

    last: bool = False

    @nn.compact
    def __call__(self, embedding: Float[Array, 'B D']) -> BlockModulation:
        active = nn.silu(embedding)
        image = Modulation(*ModulationLinear(SIX_PARTS, name='image')(active))
        if not self.last:
            return BlockModulation(image, Modulation(*ModulationLinear(SIX_PARTS, name='text')(active)))
        return BlockModulation(image, FinalModulation(*ModulationLinear(TWO_PARTS, name='text')(active)))


def modulate(x: Array, gain: Array, shift: Array, one_pass: bool = False) -> Array:
    """Layer norm without learned parameters, then gain and shift; `one_pass` as in `layer_norm`."""
    return layer_norm(x, one_pass=one_pass) * gain.astype(x.dtype) + shift.astype(x.dtype)
