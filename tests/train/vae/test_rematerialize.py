"""Rematerialization of the video VAEs: the same results and gradients in less memory."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.models.vae import VideoVAE
from support.goldens import TINY_CHECKPOINT, relative_error
from support.vae_runs import native, random, reconstruction_loss
from train.vae.rematerialize import MemoryConfig


@functools.cache
def small() -> tuple[VideoVAE, Any]:
    module, params = checkpoint.load(TINY_CHECKPOINT / 'causal_video_vae')
    assert isinstance(module, VideoVAE)
    return module, jax.tree.map(jnp.asarray, params)


@pytest.mark.parametrize(
    'codec', [pytest.param(native, marks=pytest.mark.long), pytest.param(small, marks=pytest.mark.slow)]
)
def test_forgetting_changes_neither_results_nor_gradients(codec):
    module, params = codec()
    video = random(1, 17, 16, 16, 3)
    run = lambda memory: jax.jit(jax.value_and_grad(functools.partial(reconstruction_loss, module, memory, video)))
    loss, want = run(MemoryConfig())(params)
    again, got = run(MemoryConfig(blocks=True, window=8))(params)
    assert again == pytest.approx(float(loss), rel=1e-5)
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert relative_error(flat(got), flat(want)) < 2e-5


@pytest.mark.parametrize('codec', [native, small])
def test_forgetting_keeps_less_for_the_gradient(codec):
    """Compare the residuals that the forward pass stores for the backward pass, besides the parameters."""
    module, params = codec()
    video = jnp.zeros((1, 49, 64, 64, 3))
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    def kept(memory: MemoryConfig) -> float:
        backward = lambda params: jax.vjp(functools.partial(reconstruction_loss, module, memory, video), params)[1]
        arrays = jax.tree.leaves(jax.eval_shape(backward, params))
        return (sum(array.size * array.dtype.itemsize for array in arrays) - own) / 2**20

    whole, blocks, windows = kept(MemoryConfig()), kept(MemoryConfig(blocks=True)), kept(MemoryConfig(window=16))
    print(f'kept: whole {whole:.0f}, blocks {blocks:.0f}, windows {windows:.0f} MiB')
    assert blocks < 0.5 * whole
    assert windows < 0.5 * whole


def test_windows_are_whole_latents():
    with pytest.raises(InputError, match='window is 12 frames'):
        MemoryConfig(window=12)
