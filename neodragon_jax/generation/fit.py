"""Check that the components of a checkpoint belong together, from their sizes, before any weight is read."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.models.clip import CLIPTextModel
from neodragon_jax.models.context_adapter import ContextAdapter
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.models.t5 import T5Encoder, T5EncoderWithProjection
from neodragon_jax.models.vae import VideoVAE

# Accepted classes of the components that condition the denoiser.
TEXT_CLASSES: Mapping[str, tuple[type, ...]] = {
    'clip_l': (CLIPTextModel,),
    'clip_g': (CLIPTextModel,),
    't5': (T5EncoderWithProjection, T5Encoder),
    'adapter': (ContextAdapter,),
}


class Part(NamedTuple):
    """A component: its folder, and its module, without parameters."""

    folder: pathlib.Path
    module: Any


def text_parts(root: str | os.PathLike[str], adapter: str | os.PathLike[str]) -> dict[str, Part]:
    """Return the text encoders of a checkpoint and a context adapter, by the names of TEXT_CLASSES.

    Raises:
      InputError: a component is missing or damaged, or of another class.
    """
    encoders = {'clip_l': folders.CLIP_L, 'clip_g': folders.CLIP_G, 't5': folders.T5}
    found = {name: checkpoint.component_folder(root, folder) for name, folder in encoders.items()}
    found['adapter'] = pathlib.Path(adapter)
    return {name: Part(folder, checkpoint.load_module(folder, *TEXT_CLASSES[name])) for name, folder in found.items()}


def check_fit(text: Mapping[str, Part], denoiser: Part, vae: Part) -> None:
    """Check that each component takes what the one before it gives.

    Args:
      text: parts by the names of TEXT_CLASSES.
      denoiser: a `PyramidMMDiT`.
      vae: a `VideoVAE`.
    Raises:
      InputError: two components are of different models.
    """
    clip_l, clip_g, t5, adapter = (text[name] for name in ('clip_l', 'clip_g', 't5', 'adapter'))
    sizes: PyramidMMDiT = denoiser.module
    states = getattr(t5.module.config, 'out_dim', t5.module.config.d_model)
    _require(adapter, 'text states of width', adapter.module.config.input_dims, f'{t5.folder} gives', states)
    _require(
        denoiser,
        'text states of width',
        sizes.config.width,
        f'{adapter.folder} gives',
        adapter.module.config.output_dims,
    )
    if _activation(clip_l) == 'gelu' and _activation(clip_g) == 'quick_gelu':
        raise InputError(
            f'{clip_l.folder} and {clip_g.folder} are exchanged: the first must be CLIP-L (hidden_act quick_gelu), the '
            'second CLIP-G (gelu).'
        )
    pooled = _pooled(clip_l.module) + _pooled(clip_g.module)
    given = f'{clip_l.folder} and {clip_g.folder} give'
    _require(denoiser, 'a pooled vector of width', sizes.config.pooled_projection_dim, given, pooled)
    video: VideoVAE = vae.module
    _require(
        vae,
        'latents of channels',
        video.config.encoder_out_channels,
        f'{denoiser.folder} gives',
        sizes.config.in_channels,
    )


def _require(taker: Part, what: str, taken: int, giver: str, given: int) -> None:
    if taken != given:
        raise InputError(
            f'{taker.folder} takes {what} {taken}, but {giver} {given}: they belong to different models. Give '
            'components of one checkpoint, or a student that was distilled from it.'
        )


def _activation(clip: Part) -> str:
    return clip.module.config.hidden_act


def _pooled(clip: CLIPTextModel) -> int:
    return clip.config.projection_dim if clip.projection else clip.config.hidden_size
