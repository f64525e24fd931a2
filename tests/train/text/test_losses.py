"""The loss of the text-encoder distillation against its definition in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.text import losses


def test_token_errors_are_means_over_the_valid_tokens():
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    mask = np.asarray([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    square, cosine = losses.token_errors(jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(mask))
    rows = [
        (a, b)
        for a, b, valid in zip(student.reshape(-1, 5), teacher.reshape(-1, 5), mask.ravel(), strict=True)
        if valid
    ]
    assert float(square) == pytest.approx(np.mean([np.mean((a - b) ** 2) for a, b in rows]), rel=1e-5)
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in rows]
    assert float(cosine) == pytest.approx(1 - np.mean(cosines), rel=1e-5)
    # Padded values do not matter, however large they are.
    student[mask == 0] = 1e6
    changed = losses.token_errors(jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(mask))
    assert changed == (square, cosine)


def test_token_errors_of_a_zero_token_have_a_gradient():
    teacher = jnp.ones((1, 2, 3))
    gradients = jax.grad(lambda student: sum(losses.token_errors(student, teacher, jnp.ones((1, 2)))))(0 * teacher)
    assert np.all(np.isfinite(gradients)) and np.all(gradients < 0)
