"""The loss of the text-encoder distillation.

Source: Neodragon (ND), arXiv 2511.06055, section on text-encoder distillation.
Legend: B batch, L text tokens, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

# Squared product of two norms below which the cosine is undefined.
_SMALLEST_NORMS = 1e-16


def token_errors(
    student: Float[Array, 'B L D'], teacher: Float[Array, 'B L D'], mask: Num[Array, 'B L']
) -> tuple[Float[Array, ''], Float[Array, '']]:
    """Return (square, cosine): errors of text states against the teacher's, means over all valid tokens, in float32.

    `square` is the mean over the width of (student - teacher)^2, `cosine` is 1 - cos(student, teacher); the loss of
    the text-encoder distillation is square + 0.1 cosine (ND, section on text-encoder distillation).

    Args:
      mask: nonzero for valid tokens.
    """
    valid = (mask != 0).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(valid), 1)
    square, cosine = errors_by_token(student, teacher)
    return jnp.sum(square * valid) / count, jnp.sum(cosine * valid) / count


def errors_by_token(
    student: Float[Array, 'B L D'], teacher: Float[Array, 'B L D']
) -> tuple[Float[Array, 'B L'], Float[Array, 'B L']]:
    """Return (square, cosine) of every token, see `token_errors`."""
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    product = jnp.sum(student * teacher, axis=-1)
    # One square root of a positive number, so that a token of zeros has a finite gradient.
    norms = jnp.sum(jnp.square(student), axis=-1) * jnp.sum(jnp.square(teacher), axis=-1)
    cosine = 1 - product * jax.lax.rsqrt(jnp.maximum(norms, _SMALLEST_NORMS))
    return jnp.mean(jnp.square(student - teacher), axis=-1), cosine
