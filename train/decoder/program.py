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
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.folders import VIDEO_VAE
from neodragon_jax.models.vae import Latents, Moments, Video, posterior_mean, posterior_sample
from train.data import DTYPES
from train.decoder.networks import ENCODER, DecoderConfig, Networks, abstract_networks, digest, read_networks
from train.runtime.optimizer import AveragedState, masters
from train.runtime.program import LoopConfig
from train.runtime.runner import Recipe, Training
from train.runtime.sharding import count_parameters, to_host
from train.vae.clips import Clips, ClipsConfig, blank_clips, open_clips
from train.vae.flat_convolutions import flat_convolutions
from train.vae.fresh_parameters import fresh_small_decoder, mean_color
from train.vae.rematerialize import decode, encode
from train.vae.training import VAETraining, describe_terms


class DecoderDistillation(VAETraining[DecoderConfig]):
    """The training of the small decoder as a program of the loop."""

    name = 'decoder'

    def __init__(self, config: DecoderConfig, networks: Networks, clips: Clips, cut: ClipsConfig) -> None:
        """Prepare.

        Args:
          networks: from `read_networks`, or abstract ones for a plan.
          cut: size of the random cuts.
        Raises:
          InputError: the weights of LPIPS cannot be read, the cuts do not fit the encoder, or `native_weight` is set
            without a native decoder.
        """
        if config.native_weight and networks.native is None:
            raise InputError('native_weight is not 0, but there is no native decoder; pass its folder as native.')
        super().__init__(config, networks.module, clips, cut)
        self.networks = networks
        self.native = None if networks.native is None else networks.native.clone(dtype=DTYPES[config.dtype])
        self._reconstruct, self._reconstruct_natively = jax.jit(self.reconstruct), jax.jit(self.reconstruct_natively)

    def frozen(self) -> dict[str, Any]:
        """Return the encoder, and if present the native decoder, LPIPS and the parameters to begin with."""
        parts = {**self.networks.encoder, 'native': self.networks.native_decoder, 'start': self.networks.start}
        if self.networks.start is None:
            parts['color'] = mean_color(self.clips.training)
        return self.terms.frozen() | {name: part for name, part in parts.items() if part is not None}

    def init_state(self, key: PRNGKeyArray, frozen: Any) -> AveragedState:
        """Return the state before the first step."""
        if self.networks.start is None:
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
        """Return the moments of clips, which do not depend on the trained parameters."""
        with flat_convolutions(self.config.flat):
            return encode(self.module, {name: frozen[name] for name in ENCODER}, video, self.config.memory)

    def reconstruct(self, params: Any, frozen: Any, video: Video) -> Video:
        """Return the reconstruction of clips, without the posterior's noise."""
        return decode(self.module, params, posterior_mean(self.encode(frozen, video)), self.config.memory)

    def reconstruct_natively(self, frozen: Any, video: Video) -> Video:
        """Return the native decoder's reconstruction from the same latents."""
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
        checkpoint.save(folder / VIDEO_VAE, self.module, {**self.networks.encoder, **params})
        record = {'decoder_parameters': count_parameters(params), 'iterations': int(step)}
        with atomic_file(folder / f'{self.name}.json') as path:
            path.write_text(json.dumps(self.metadata() | record, indent=2) + '\n')

    def metadata(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share: sizes, objective and data, but not learning rates."""
        own = {'native_weight': self.config.native_weight, 'encoder': digest(self.networks.encoder)}
        return super().metadata() | own


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of configs/decoder.py.

    Attributes:
      data: folder of clips, or shapes:WORLD for drawn ones, of train/shapes/world.py.
      workdir: folder of the run.
      seed: seed of parameters, data order and all randomness in steps.
    """

    data: str
    workdir: str
    seed: int
    decoder: DecoderConfig
    clips: ClipsConfig
    loop: LoopConfig


def load(settings: Settings) -> Training:
    """Return the distillation on stored or drawn clips.

    Raises:
      InputError: the data or the networks cannot be read, or do not fit the settings.
    """
    networks = read_networks(settings.decoder)
    clips = open_clips(settings.data, settings.clips, settings.seed)
    program = DecoderDistillation(settings.decoder, networks, clips, settings.clips)
    describe_terms(program)
    return Training(program, clips.training, settings.loop)


def abstract(settings: Settings) -> Training:
    """Return the distillation on blank clips, for a plan or for sizing.

    Named networks and LPIPS weights are read. Without a named video VAE the sizes are the released ones; without LPIPS
    weights that term is left out, as in training.

    Raises:
      InputError: they cannot be read.
    """
    networks = abstract_networks(settings.decoder)
    program = DecoderDistillation(settings.decoder, networks, blank_clips(settings.clips), settings.clips)
    return Training(program, program.clips.training, settings.loop)


REQUIRED = {'decoder.start': 'FOLDER of a video VAE', 'data': 'FOLDER of clips, or shapes:cpu', 'workdir': 'FOLDER'}
RECIPE = Recipe(Settings, load, abstract, REQUIRED)
