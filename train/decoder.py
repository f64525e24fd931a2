"""Asymmetric decoder distillation: the small decoder learns to read the latents of a frozen encoder.

    python -m train.decoder --config=configs/decoder.py --config.decoder.start=VAE --config.data=FOLDER \
        --config.workdir=DIR

    z    = a posterior sample of clip x, by the frozen encoder
    loss = terms(small decoder(z), x) + native || small decoder(z) - native decoder(z) ||^2

The paper's terms are the squared error and LPIPS; the second part is an option of ours, 0 by default. There is no
divergence: the encoder does not move, so a denoiser of its latents serves both decoders.

The result is a video VAE in Neodragon's layout, with the encoder's tensors byte for byte as they were.

Source: Neodragon, arXiv 2511.06055, section on asymmetric decoder distillation.
Legend: B batch, T frames, H W pixels, t latent frames, h w latent grid, C latent channels.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.folders import VIDEO_VAE
from neodragon_jax.config.neodragon import CausalEncoderConfig, VideoVAEConfig
from neodragon_jax.config.pyramid_flow import PyramidFlowVAEConfig
from neodragon_jax.models.native_decoder import NativeVAE
from neodragon_jax.models.vae import (
    CausalVAE,
    Latents,
    Moments,
    Video,
    VideoVAE,
    posterior_mean,
    posterior_sample,
)
from train.aot.abstract import AbstractProgram
from train.data import DTYPES
from train.runtime import loop
from train.runtime.optimizer import AveragedState, masters
from train.runtime.runner import command_line
from train.runtime.sharding import count_parameters, start_processes, to_host
from train.vae.clips import Clips, ClipsConfig, blank_clips
from train.vae.flat_convolutions import flat_convolutions
from train.vae.fresh_parameters import fresh_small_decoder, mean_color
from train.vae.reconstruction import TermsConfig
from train.vae.rematerialize import decode, encode
from train.vae.vae_program import (
    CodecConfig,
    CodecProgram,
    abstract,
    clips_of,
    read_settings,
)

ENCODER, DECODER = ('encoder', 'quant_conv'), ('decoder', 'post_quant_conv')
# Relative difference up to which two encoders are one, stored in different types.
SAME_ENCODER = 0.01

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(CodecConfig):
    """Options of the objective.

    Attributes:
      start: component folder of a video VAE, native or asymmetric: the frozen encoder.
      features: widths of a fresh small decoder; () goes on from the one in `start`.
      native: component folder with the native decoder of this encoder, to compare with; '' takes that of `start`, if
        it has one.
      native_weight: weight of the squared difference to what the native decoder makes.
    """

    start: str = ''
    features: tuple[int, ...] = (256, 128, 64, 64)
    native: str = ''
    native_weight: float = 0.0
    terms: TermsConfig = dataclasses.field(default_factory=lambda: TermsConfig(square=1.0, lpips=1.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.native_weight < 0:
            raise InputError(f'native_weight is {self.native_weight}; it must be at least 0.')
        levels = len(VideoVAEConfig().decoder_num_features)
        if self.features and (len(self.features) != levels or min(self.features) < 1):
            raise InputError(f'features is {self.features}; give {levels} widths, or () to go on from a decoder.')


@dataclasses.dataclass(frozen=True)
class Codecs:
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


class DecoderDistillation(CodecProgram[DecoderConfig]):
    """The training of the small decoder as a program of the loop."""

    name = 'decoder'

    def __init__(self, config: DecoderConfig, codecs: Codecs, clips: Clips, cut: ClipsConfig) -> None:
        """Prepare.

        Args:
          codecs: from `read_codecs`, or abstract ones for a plan.
          cut: what is seen of the clips.
        Raises:
          InputError: the weights of LPIPS cannot be read, the cuts do not fit the encoder, or there is no native
            decoder to weigh.
        """
        if config.native_weight and codecs.native is None:
            raise InputError('native_weight is not 0, but there is no native decoder; pass its folder as native.')
        super().__init__(config, codecs.module, clips, cut)
        self.codecs = codecs
        self.native = None if codecs.native is None else codecs.native.clone(dtype=DTYPES[config.dtype])
        self._reconstruct, self._reconstruct_natively = jax.jit(self.reconstruct), jax.jit(self.reconstruct_natively)

    def frozen(self) -> dict[str, Any]:
        """Return the encoder, the native decoder, LPIPS, and what to begin with, as far as there are such."""
        parts = {**self.codecs.encoder, 'native': self.codecs.native_decoder, 'start': self.codecs.start}
        if self.codecs.start is None:
            parts['color'] = mean_color(self.clips.training)
        return self.terms.frozen() | {name: part for name, part in parts.items() if part is not None}

    def init_state(self, key: PRNGKeyArray, frozen: Any) -> AveragedState:
        """Return the state before the first step."""
        if self.codecs.start is None:
            return self.begin(fresh_small_decoder(self.module, key, frozen['color']))
        return self.begin(masters(frozen['start']))

    def loss(self, params: Any, frozen: Any, batch: Mapping[str, Array]) -> tuple[Float[Array, ''], dict[str, Array]]:
        """Return the loss of clips `video` with the posterior's `noise`, and its terms."""
        moments = self.encode(frozen, batch['video']).astype(jnp.float32)
        latents = posterior_sample(moments, batch['noise'])
        frames = decode(self.module, params, latents, self.config.memory)
        loss, terms = self.terms(frozen, frames, batch['video'])
        if self.config.native_weight:
            error = frames.astype(jnp.float32) - self._native_frames(frozen, latents).astype(jnp.float32)
            terms['native'] = jnp.mean(jnp.square(error))
            loss += self.config.native_weight * terms['native']
        return loss, terms

    def encode(self, frozen: Any, video: Video) -> Moments:
        """Return the moments of clips; they do not depend on what is trained."""
        with flat_convolutions(self.config.flat):
            return encode(self.module, {name: frozen[name] for name in ENCODER}, video, self.config.memory)

    def reconstruct(self, params: Any, frozen: Any, video: Video) -> Video:
        """Return what becomes of clips, without the posterior's noise."""
        return decode(self.module, params, posterior_mean(self.encode(frozen, video)), self.config.memory)

    def reconstruct_natively(self, frozen: Any, video: Video) -> Video:
        """Return what the native decoder makes of the same latents."""
        return self._native_frames(frozen, posterior_mean(self.encode(frozen, video)))

    def _native_frames(self, frozen: Any, latents: Latents) -> Video:
        assert self.native is not None
        with flat_convolutions(self.config.flat):
            return decode(self.native, frozen['native'], latents, self.config.memory)

    def evaluate(self, state: AveragedState, frozen: Any, folder: pathlib.Path) -> dict[str, float]:
        """Return PSNR and SSIM of held-out clips, of both decoders where there are two; write some side by side."""
        ways = {'small': functools.partial(self._reconstruct, state.result, frozen)}
        if self.native is not None:
            ways['native'] = functools.partial(self._reconstruct_natively, frozen)
        return self.evaluation(ways, state.result, folder)

    def finish(self, state: AveragedState, folder: pathlib.Path) -> None:
        """Write encoder and small decoder in the released layout, and `decoder.json`."""
        params, step = to_host((state.result, state.step))
        if jax.process_index() != 0:
            return
        # Not through the devices, which may store other types.
        checkpoint.save(folder / VIDEO_VAE, self.module, {**self.codecs.encoder, **params})
        record = {'decoder_parameters': count_parameters(params), 'iterations': int(step)}
        with atomic_file(folder / f'{self.name}.json') as path:
            path.write_text(json.dumps(self.metadata() | record, indent=2) + '\n')

    def metadata(self) -> dict[str, Any]:
        """Return what makes two runs the same training: sizes, objective and data, but not learning rates."""
        own = {'native_weight': self.config.native_weight, 'encoder': digest(self.codecs.encoder)}
        return super().metadata() | own


def digest(params: Params) -> str:
    """Return a hash of parameters, with their names."""
    sha = hashlib.sha256()
    for path, leaf in sorted(traverse_util.flatten_dict(dict(params)).items()):
        sha.update('/'.join(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()[:16]


def read_codecs(config: DecoderConfig) -> Codecs:
    """Return the networks that settings name.

    Raises:
      InputError: a folder is missing or of another kind, or the native decoder is of another encoder.
    """
    if not config.start:
        raise InputError('config.decoder.start is empty; pass the folder of a video VAE, which has the encoder.')
    module, params = _read(config.start)
    encoder = {name: params[name] for name in ENCODER}
    start = None
    if not config.features:
        if not isinstance(module, VideoVAE):
            raise InputError(f'features is (), but start {config.start} has no small decoder; give its widths.')
        start = {name: params[name] for name in DECODER}
    native, native_params = (module, params) if isinstance(module, NativeVAE) else (None, None)
    if config.native:
        native, native_params = _read(config.native)
        if not isinstance(native, NativeVAE):
            raise InputError(f'native {config.native} has a small decoder; pass the folder of a CausalVideoVAE.')
        _check_same(encoder, {name: native_params[name] for name in ENCODER}, config)
    small = module if isinstance(module, VideoVAE) and start else VideoVAE(_sizes(module.config, config.features))
    decoder = None if native_params is None else {name: native_params[name] for name in DECODER}
    return Codecs(small, encoder, start, native, decoder)  # pyright: ignore[reportArgumentType]


def full_codecs(config: DecoderConfig) -> Codecs:
    """Return abstract networks of the released sizes, for a plan without weights."""
    sizes = _sizes(VideoVAEConfig(), config.features or VideoVAEConfig().decoder_num_features)
    small, native = VideoVAE(sizes), NativeVAE(PyramidFlowVAEConfig()) if config.native_weight else None
    params = checkpoint.abstract_params(small)
    part = lambda params, names: {name: params[name] for name in names}
    decoder = None if native is None else part(checkpoint.abstract_params(native), DECODER)
    return Codecs(small, part(params, ENCODER), None, native, decoder)


def _read(folder: str) -> tuple[CausalVAE, Any]:
    """Return a stored video VAE of either kind, and its parameters."""
    module, params = checkpoint.load(folder)
    if not isinstance(module, CausalVAE):
        raise InputError(f'{folder} holds a {checkpoint.class_name(module)}; pass the folder of a video VAE.')
    return module, params


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


def abstract_program(settings: ConfigDict) -> AbstractProgram:
    """Return the program for sizing, see train/aot/abstract.py; `settings.clips` stands for the data.

    Without a named video VAE it has the released sizes. What is named, codecs or LPIPS, is read; without a file LPIPS
    is left out, as in training.

    Raises:
      InputError: a setting is unknown or out of range, or what is named cannot be read.
    """
    config, cut, run = read_settings(DecoderConfig, 'decoder', settings.to_dict())
    codecs = full_codecs(config)
    if config.start:
        read = read_codecs(config)
        held = {name: abstract(getattr(read, name)) for name in ('encoder', 'start', 'native_decoder')}
        codecs = dataclasses.replace(read, **held)
    program = DecoderDistillation(config, codecs, blank_clips(cut), cut)
    return AbstractProgram(program, program.clips.training, run)


def main(settings: ConfigDict, dry_run: bool = False) -> None:
    """Train as the settings say (see configs/decoder.py), or print the plan of it.

    A plan needs neither data nor weights; without weights it has the released sizes.

    Raises:
      InputError: a setting is wrong or does not fit the data.
    """
    values = settings.to_dict()
    config, cut, run = read_settings(DecoderConfig, 'decoder', values)
    start_processes(run.distributed)
    codecs = full_codecs(config) if dry_run and not config.start else read_codecs(config)
    program = DecoderDistillation(config, codecs, clips_of(values, cut, dry_run), cut)
    if dry_run:
        print(loop.plan(program, program.clips.training, run))
        return
    if jax.process_index() == 0:
        print(f'{program.name}: {program.terms.describe()}')
    loop.run(program, program.clips.training, run)


if __name__ == '__main__':
    command_line(main, 'configs/decoder.py')
