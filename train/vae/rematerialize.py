"""Encoding and decoding clips in training with less memory: activations are discarded and computed again.

Two methods, neither of which changes a result:

* blocks: of every residual block only the input is kept for its gradient.
* windows: a clip passes in windows of time. Of each, only the context for the next window is kept: two frames of every
  causal convolution, or the memories of TinyAEHV.

Both leave the modules as they are: a method interceptor wraps the blocks' calls.

Legend: B batch, T frames, H W pixels, t latent frames, h w latent grid, C latent channels, M = 2C moments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from neodragon_jax.base.errors import InputError
from neodragon_jax.models.causal_layers import CONTEXT, FrameAttention, ResnetBlock
from neodragon_jax.models.vae import CausalVAE, Latents, Moments, Video, VideoVAE
from neodragon_jax.models.vae_decoder import MemoryBlock

BLOCKS = (ResnetBlock, FrameAttention, MemoryBlock)
FRAMES = 8  # of a latent frame

Params = Mapping[str, Any]
# (parameters, what the window before left, window) -> (result, what this one leaves)
Step = Callable[[Params, Any, Array], tuple[Array, Any]]


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Which activations are kept for the gradient.

    Attributes:
      blocks: discard those inside residual blocks.
      window: frames of a window after the first frame, a multiple of 8; 0 passes clips whole.
    """

    blocks: bool = False
    window: int = 0

    def __post_init__(self) -> None:
        if self.window < 0 or self.window % FRAMES:
            raise InputError(f'window is {self.window} frames; use a multiple of {FRAMES}, or 0 for whole clips.')


def encode(module: CausalVAE, params: Params, video: Video, memory: MemoryConfig) -> Moments:
    """Return the moments of clips in [-1, 1], as `module.encode` does."""
    with _rematerializing(memory):
        if not memory.window or video.shape[1] == 1:
            return _apply(module, params, video, 'encode')
        return _windows(_step(module, 'encode_next'), params, {}, video, memory.window)


def decode(module: CausalVAE, params: Params, latents: Latents, memory: MemoryConfig) -> Video:
    """Return the clips of de-normalized latents, as `module.decode` does."""
    with _rematerializing(memory):
        if not memory.window or latents.shape[1] == 1:
            return _apply(module, params, latents, 'decode')
        window = memory.window // FRAMES
        if not isinstance(module, VideoVAE):
            return _windows(_step(module, 'decode_next'), params, {}, latents, window)
        batch, _, height, width, _ = latents.shape
        step = lambda params, memories, part: module.apply({'params': params}, part, memories, method='decode_step')
        frames = _windows(step, params, module.init_memories(batch, height, width), latents, window)  # pyright: ignore[reportArgumentType]
        return frames[:, FRAMES - 1 :]


def _apply(module: CausalVAE, params: Params, x: Array, method: str) -> Float[Array, 'B _ _ _ _']:
    return module.apply({'params': params}, x, method=method)  # pyright: ignore[reportReturnType]


def _step(module: CausalVAE, method: str) -> Step:
    """Return the step of a method whose causal layers leave their last frames in a collection."""

    def step(params: Params, context: Any, part: Array) -> tuple[Array, Any]:
        return module.apply({'params': params, **context}, part, method=method, mutable=[CONTEXT])  # pyright: ignore[reportReturnType]

    return step


def _windows(
    step: Step, params: Params, state: Any, clip: Float[Array, 'B T _ _ _'], window: int
) -> Float[Array, 'B _ _ _ _']:
    """Run a step over a clip: 1 + window frames (or latents) first, then window at a time."""
    parts = []
    for part in jnp.split(clip, [*range(window + 1, clip.shape[1], window)], axis=1):
        result, state = jax.checkpoint(step)(params, state, part)
        parts.append(result)
    return jnp.concatenate(parts, axis=1)


@contextlib.contextmanager
def _rematerializing(memory: MemoryConfig) -> Iterator[None]:
    """Rematerialize the residual blocks of all modules that are applied inside, if asked."""
    if not memory.blocks:
        yield
        return
    with nn.intercept_methods(functools.partial(_rematerialized, [])):
        yield


def _rematerialized(
    inside: list[nn.Module], call: Callable[..., Any], args: Sequence[Any], kwargs: Any, context: Any
) -> Any:
    """Call a method; a block's is wrapped in `nn.remat`, which calls it again, and then it is `inside` one."""
    if inside or context.method_name != '__call__' or not isinstance(context.module, BLOCKS):
        return call(*args, **kwargs)
    inside.append(context.module)
    try:
        return nn.remat(lambda block, *args: block(*args, **kwargs))(context.module, *args)
    finally:
        inside.pop()
