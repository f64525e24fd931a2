"""Operands of the TPU's attention kernel, each made by one pass over the projected heads.

    operand = [ rotate(factor * scale * x / rms(x)), zeros ]   tokens of text, then image, then padding
              [ hides                                      ]   additional dimensions, see `splash`

As separate operations, the TPU compiler writes every step to memory: norm, each half of the rotation, text and image in
one array, padding, additional dimensions. On other devices than TPUs the kernels are interpreted, for tests only.

Legend: B batch, N heads, K head dim, k = K / 2, L text tokens, X image tokens, F additional dimensions, P tokens padded
to whole tiles.
Source: arXiv 2403.03206 (RMS norm of queries and keys), arXiv 2104.09864 (rotary embedding).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

# Name of the kernels, by which `train.aot` knows them.
NAME = 'attention_operand'


class Heads(NamedTuple):
    """Projected heads of both streams, before norm and rotation.

    Attributes:
      text: None if it has no rows.
      text_scale, image_scale: scales of the RMS norm; None for values, which have neither norm nor rotation.
    """

    text: Float[Array, 'B N K L'] | None
    image: Float[Array, 'B N K X']
    text_scale: Float[Array, ' K'] | None = None
    image_scale: Float[Array, ' K'] | None = None


class Form(NamedTuple):
    """Static numbers of an operand.

    Attributes:
      tokens: P.
      epsilon: of the norm.
      factor: of the normalized heads.
    """

    tokens: int
    epsilon: float
    factor: float = 1.0


def place_values(heads: Heads, tokens: int) -> Float[Array, 'B N K P']:
    """Return the heads of both streams in one array, with zeros behind them."""
    return _operand(Form(tokens, 0.0), _parts(heads), ())


def place_normed(
    heads: Heads, cos: Float[Array, 'B 1 k X'], sin: Float[Array, 'B 1 k X'], hides: Float[Array, 'B 1 F P'], form: Form
) -> Float[Array, 'B N _ P']:
    """Return the normalized heads of both streams, those of the image rotated, with `hides` below: [B, N, K + F, P].

    Args:
      cos, sin: of the image tokens; neither they nor `hides` get a gradient.
    """
    tables = cos.astype(jnp.float32), sin.astype(jnp.float32), hides.astype(heads.image.dtype)
    return _operand(form, _parts(heads), tables)


def _parts(heads: Heads) -> tuple[tuple[Array, ...], ...]:
    """Return the arrays of text, if it has rows, and of the image: heads, and their scale [K, 1] if they have one."""
    pairs = (heads.text, heads.text_scale), (heads.image, heads.image_scale)
    column = lambda scale: () if scale is None else (scale.astype(jnp.float32)[:, None],)
    return tuple((x, *column(scale)) for x, scale in pairs if x is not None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _operand(form: Form, parts: tuple[tuple[Array, ...], ...], tables: tuple[Array, ...]) -> Array:
    """Return an operand; `tables` are cos, sin and hides, or nothing."""
    batch, heads, width, _ = parts[0][0].shape
    rows = width + (tables[2].shape[2] if tables else 0)
    out = jax.ShapeDtypeStruct((batch, heads, rows, form.tokens), parts[0][0].dtype)
    arrays = [array for part in parts for array in part] + list(tables)
    (made,) = _run(functools.partial(_forward, form, [len(part) for part in parts]), arrays, [out])
    return made


def _save(form: Form, parts: Any, tables: Any) -> tuple[Array, Any]:
    return _operand(form, parts, tables), (parts, tables)


def _pull_back(form: Form, saved: Any, change: Array) -> tuple[Any, Any]:
    """Return the gradients of the parts; a scale's is the sum of those that each head of each sample gives."""
    parts, tables = saved
    outs, lengths = [], [len(part) for part in parts]
    for x, *scale in parts:
        outs.append(jax.ShapeDtypeStruct(x.shape, x.dtype))
        outs += [jax.ShapeDtypeStruct((*x.shape[:2], x.shape[2], 1), jnp.float32)] * len(scale)
    arrays = [array for part in parts for array in part] + list(tables[:2]) + [change]
    made = iter(_run(functools.partial(_backward, form, lengths), arrays, outs))
    grads = tuple((next(made), *(next(made).sum((0, 1)) for _ in scale)) for _, *scale in parts)
    return grads, jax.tree.map(jnp.zeros_like, tables)


_operand.defvjp(_save, _pull_back)


def _run(body: Callable[..., None], arrays: Sequence[Array], outs: Sequence[Any]) -> list[Array]:
    """Run a kernel for every head of every sample; arrays of one head serve all heads."""
    batch, heads = outs[0].shape[:2]

    def block(array: Any) -> pl.BlockSpec:
        if array.ndim == 2:  # a scale, for all samples and heads
            return pl.BlockSpec(array.shape, lambda b, n: (0, 0))
        if array.shape[1] < heads:  # one for all heads
            return pl.BlockSpec((1, 1, *array.shape[2:]), lambda b, n: (b, 0, 0, 0))
        return pl.BlockSpec((1, 1, *array.shape[2:]), lambda b, n: (b, n, 0, 0))

    def call(interpret: bool, *arrays: Array) -> list[Array]:
        kernel = pl.pallas_call(
            body,
            grid=(batch, heads),
            in_specs=[block(array) for array in arrays],
            out_specs=[block(out) for out in outs],
            out_shape=list(outs),
            interpret=interpret,
            name=NAME,
        )
        return list(kernel(*arrays))

    on_tpu, elsewhere = functools.partial(call, False), functools.partial(call, True)
    return jax.lax.platform_dependent(*arrays, tpu=on_tpu, default=elsewhere)


def _forward(form: Form, lengths: Sequence[int], *refs: Any) -> None:
    """Write one head of one sample."""
    *inputs, out = refs
    parts, tables = _split(inputs, lengths)
    out[...] = jnp.zeros_like(out)
    start = 0
    for number, (x_ref, *scale) in enumerate(parts):
        x, stop = x_ref[0, 0], start + x_ref.shape[3]
        if scale:
            wide = x.astype(jnp.float32)
            x = wide * _inverse_rms(wide, form.epsilon) * (form.factor * scale[0][...])
            if number == len(parts) - 1:
                x = _rotated(x, tables[0][0, 0], tables[1][0, 0])
        out[0, 0, : x.shape[0], start:stop] = x.astype(out.dtype)
        start = stop
    if tables:
        out[0, 0, parts[0][0].shape[2] :, :] = tables[2][0, 0]


def _backward(form: Form, lengths: Sequence[int], *refs: Any) -> None:
    """Write the gradients of one head of one sample."""
    count = sum(lengths)
    parts, rest = _split(refs[: len(refs) - count], lengths)
    grads = iter(refs[len(refs) - count :])
    *tables, change = rest
    start = 0
    for number, (x_ref, *scale) in enumerate(parts):
        stop = start + x_ref.shape[3]
        grad = change[0, 0, : x_ref.shape[2], start:stop]
        out = next(grads)
        if scale:
            x, grad = x_ref[0, 0].astype(jnp.float32), grad.astype(jnp.float32)
            if number == len(parts) - 1:
                grad = _rotated(grad, tables[0][0, 0], -tables[1][0, 0])
            inverse = _inverse_rms(x, form.epsilon)
            grad = form.factor * grad
            next(grads)[0, 0] = jnp.sum(grad * x * inverse, axis=1, keepdims=True)
            grad = grad * scale[0][...]
            mean = jnp.mean(grad * x, axis=0, keepdims=True)
            grad = inverse * (grad - x * mean * inverse * inverse)
        out[0, 0] = grad.astype(out.dtype)
        start = stop


def _split(refs: Sequence[Any], lengths: Sequence[int]) -> tuple[list[Sequence[Any]], Sequence[Any]]:
    """Return the references of each part, and the others."""
    parts, start = [], 0
    for length in lengths:
        parts.append(refs[start : start + length])
        start += length
    return parts, refs[start:]


def _inverse_rms(x: Float[Array, 'K T'], epsilon: float) -> Float[Array, '1 T']:
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=0, keepdims=True) + epsilon)


def _rotated(x: Float[Array, 'K X'], cos: Float[Array, 'k X'], sin: Float[Array, 'k X']) -> Float[Array, 'K X']:
    first, second = jnp.split(x, 2, axis=0)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=0)
