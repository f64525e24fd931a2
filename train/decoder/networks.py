"""The networks of the decoder distillation: read from component folders, or abstract at the released sizes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.abstract import abstract_params
from neodragon_jax.config.neodragon import CausalEncoderConfig, VideoVAEConfig
from neodragon_jax.config.pyramid_flow import PyramidFlowVAEConfig
from neodragon_jax.models.native_decoder import NativeVAE
from neodragon_jax.models.vae import CausalVAE, VideoVAE
from train.runtime.settings import PathText, check_range
from train.vae.reconstruction import TermsConfig
from train.vae.training import VAETrainingConfig, abstract

ENCODER, DECODER = ('encoder', 'quant_conv'), ('decoder', 'post_quant_conv')
# Relative difference up to which two encoders are the same one, stored in different types.
SAME_ENCODER = 0.01

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(VAETrainingConfig):
    """Options of the objective.

    Attributes:
      start: component folder of a video VAE, native or asymmetric: the frozen encoder.
      features: widths of a fresh small decoder; () continues from the one in `start`.
      native: component folder with the native decoder of this encoder, to compare with; '' takes that of `start`, if
        it has one.
      native_weight: weight of the squared difference from the output of the native decoder.
    """

    start: PathText = ''
    features: tuple[int, ...] = (256, 128, 64, 64)
    native: PathText = ''
    native_weight: float = 0.0
    terms: TermsConfig = dataclasses.field(default_factory=lambda: TermsConfig(square=1.0, lpips=1.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 'native_weight', least=0)
        levels = len(VideoVAEConfig().decoder_num_features)
        if self.features and (len(self.features) != levels or min(self.features) < 1):
            raise InputError(f'features is {self.features}; give {levels} widths, or () to continue from a decoder.')


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of the distillation.

    Attributes:
      module: encoder and small decoder.
      encoder: its frozen parameters, as stored.
      start: parameters of the small decoder to begin with, or None.
      native, native_decoder: the native decoder and its parameters, or None.
    """

    module: VideoVAE
    encoder: Params
    start: Params | None = None
    native: NativeVAE | None = None
    native_decoder: Params | None = None


def digest(params: Params) -> str:
    """Return a hash of parameters, with their names."""
    sha = hashlib.sha256()
    for path, leaf in sorted(traverse_util.flatten_dict(dict(params)).items()):
        sha.update('/'.join(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()[:16]


def read_networks(config: DecoderConfig) -> Networks:
    """Return the networks that settings name.

    Raises:
      InputError: a folder is missing or of another kind, or the native decoder is of another encoder.
    """
    if not config.start:
        raise InputError('config.decoder.start is empty; pass the folder of a video VAE, which has the encoder.')
    module, params = checkpoint.load(config.start, CausalVAE)
    encoder = {name: params[name] for name in ENCODER}
    start = None
    if not config.features:
        if not isinstance(module, VideoVAE):
            raise InputError(f'features is (), but start {config.start} has no small decoder; give its widths.')
        start = {name: params[name] for name in DECODER}
    native, native_params = (module, params) if isinstance(module, NativeVAE) else (None, None)
    if config.native:
        native, native_params = checkpoint.load(config.native, NativeVAE)
        _check_same(encoder, {name: native_params[name] for name in ENCODER}, config)
    small = module if isinstance(module, VideoVAE) and start else VideoVAE(_sizes(module.config, config.features))
    decoder = None if native_params is None else {name: native_params[name] for name in DECODER}
    return Networks(small, encoder, start, native, decoder)  # pyright: ignore[reportArgumentType]


def released_networks(config: DecoderConfig) -> Networks:
    """Return abstract networks of the released sizes, for a plan without weights."""
    sizes = _sizes(VideoVAEConfig(), config.features or VideoVAEConfig().decoder_num_features)
    small, native = VideoVAE(sizes), NativeVAE(PyramidFlowVAEConfig()) if config.native_weight else None
    params = abstract_params(small)
    part = lambda params, names: {name: params[name] for name in names}
    decoder = None if native is None else part(abstract_params(native), DECODER)
    return Networks(small, part(params, ENCODER), None, native, decoder)


def _sizes(encoder: CausalEncoderConfig, features: tuple[int, ...]) -> VideoVAEConfig:
    """Return the sizes of an encoder with a small decoder."""
    names = [field.name for field in dataclasses.fields(CausalEncoderConfig)]
    sizes = VideoVAEConfig(**{name: getattr(encoder, name) for name in names}, decoder_num_features=features)
    for down, up in (('spatial', sizes.decoder_space_upscale), ('temporal', sizes.decoder_time_upscale)):
        if sum(getattr(sizes, f'encoder_{down}_down_sample')) != sum(up):
            raise InputError(f'the encoder does not halve its {down} axes {sum(up)} times, as the small decoder needs.')
    return sizes


def _check_same(encoder: Params, other: Params, config: DecoderConfig) -> None:
    """Raise InputError unless two encoders are the same but for their stored types."""
    left, right = (dict[Any, Any](traverse_util.flatten_dict(dict(tree))) for tree in (encoder, other))
    same = left.keys() == right.keys() and all(_close(left[path], right[path]) for path in left)
    if not same:
        raise InputError(
            f'native {config.native} has another encoder than start {config.start}, hence other latents; pass the one '
            'that the encoder was trained with.'
        )


def _close(left: np.ndarray, right: np.ndarray) -> bool:
    left, right = np.asarray(left, np.float32), np.asarray(right, np.float32)
    return left.shape == right.shape and bool(
        np.linalg.norm(left - right) <= SAME_ENCODER * np.linalg.norm(left.reshape(-1))
    )


def abstract_networks(config: DecoderConfig) -> Networks:
    """Return abstract networks of the named folders' sizes, or of the released ones without `start`.

    Raises:
      InputError: as of `read_networks`.
    """
    if not config.start:
        return released_networks(config)
    networks = read_networks(config)
    shapes = {name: abstract(getattr(networks, name)) for name in ('encoder', 'start', 'native_decoder')}
    return dataclasses.replace(networks, **shapes)
