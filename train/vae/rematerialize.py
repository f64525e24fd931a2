"""Rematerialization for training video VAEs: activations are discarded and recomputed to save memory.

There are two methods; neither changes a result:

* blocks: for each residual block, only the input is kept for the gradient.
* windows: a clip is processed in windows of time. For each, only the context of the next window is kept: two frames of
  every causal convolution, or the memories of TinyAEHV.

The modules are unchanged: a method interceptor wraps the calls of the blocks.

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
FRAMES = 8  # per latent frame

Params = Mapping[str, Any]
# (parameters, context of the previous window, window) -> (result, context for the next window)
Step = Callable[[Params, Any, Array], tuple[Array, Any]]


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Options of the rematerialization.

    Attributes:
      blocks: discard the activations inside residual blocks.
      window: frames of a window after the first frame, a multiple of 8; 0 processes clips whole.
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
    """Return the step of a method whose causal layers store their last frames in a collection."""

    def step(params: Params, context: Any, part: Array) -> tuple[Array, Any]:
        return module.apply({'params': params, **context}, part, method=method, mutable=[CONTEXT])  # pyright: ignore[reportReturnType]

    return step


def _windows(
    step: Step, params: Params, state: Any, clip: Float[Array, 'B T _ _ _'], window: int
) -> Float[Array, 'B _ _ _ _']:
    """Run a step over a clip: first 1 + window frames (or latents), then `window` at a time."""
    parts = []
    for part in jnp.split(clip, [*range(window + 1, clip.shape[1], window)], axis=1):
        result, state = jax.checkpoint(step)(params, state, part)
        parts.append(result)
    return jnp.concatenate(parts, axis=1)


@contextlib.contextmanager
def _rematerializing(memory: MemoryConfig) -> Iterator[None]:
    """Rematerialize the residual blocks of all modules applied inside the block, if `memory.blocks`."""
    if not memory.blocks:
        yield
        return
    with nn.intercept_methods(functools.partial(_rematerialized, [])):
        yield


def _rematerialized(
    inside: list[nn.Module], call: Callable[..., Any], args: Sequence[Any], kwargs: Any, context: Any
) -> Any:
    """Call a method, wrapped in `nn.remat` if it is a residual block's and the call is not already `inside` one."""
    if inside or context.method_name != '__call__' or not isinstance(context.module, BLOCKS):
        return call(*args, **kwargs)
    inside.append(context.module)
    try:
        return nn.remat(lambda block, *args: block(*args, **kwargs))(context.module, *args)
    finally:
        inside.pop()
