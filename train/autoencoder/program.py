"""A video autoencoder from random parameters: the causal encoder and the native decoder learn latents of a domain.

    python -m train.autoencoder --config=configs/autoencoder.py:tiny --config.workdir=DIR

    z    = mean + deviation noise,   the posterior of clip x
    loss = terms(decode(z), x) + kl KL(posterior || N(0, 1) of normalized latents)

`terms` are weighted reconstruction errors (`reconstruction.TermsConfig`). At the end the weights are rescaled so that
the latents have the mean and deviation that `normalize` assumes (`latent_statistics`).

The result is a video VAE in Pyramid-Flow's layout. train.latents makes a teacher's data with it, and train.decoder
distills its decoder into the small one that runs on phones.

Source: Pyramid-Flow, arXiv 2410.05954, section 3.4; the prior on normalized latents is ours.
Legend: B batch, T frames, H W pixels, t latent frames, h w latent grid, C latent channels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.folders import PYRAMID_FLOW_VAE
from neodragon_jax.config.pyramid_flow import PyramidFlowVAEConfig
from neodragon_jax.models.native_decoder import NativeVAE
from neodragon_jax.models.vae import Latents, Moments, Video, posterior_mean, posterior_sample
from train.data.sources import Repeated
from train.runtime.optimizer import AveragedState, masters
from train.runtime.program import LoopConfig
from train.runtime.runner import Recipe, Training
from train.runtime.settings import PathText, check_range
from train.runtime.sharding import count_parameters, to_host
from train.vae.clips import Clips, ClipsConfig, blank_clips, middle_cut, open_clips, to_float
from train.vae.flat_convolutions import flat_convolutions
from train.vae.fresh_parameters import fresh_autoencoder
from train.vae.latent_statistics import fit_and_fold, prior_divergence
from train.vae.principal_start import principal_layers
from train.vae.reconstruction import TermsConfig
from train.vae.rematerialize import decode, encode
from train.vae.training import VAETraining, VAETrainingConfig, describe_terms
from train.vae.training import abstract as as_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(VAETrainingConfig):
    """Options of the objective.

    Attributes:
      sizes: of the autoencoder.
      start: component folder of an autoencoder to continue from, with its sizes; '' begins with fresh parameters.
      kl: weight of the divergence, in nats per latent number.
      statistics: training clips on which the latents' moments are measured at the end.
    """

    sizes: PyramidFlowVAEConfig = dataclasses.field(default_factory=PyramidFlowVAEConfig)
    start: PathText = ''
    terms: TermsConfig = dataclasses.field(default_factory=lambda: TermsConfig(absolute=1.0, lpips=1.0))
    kl: float = 1e-4
    statistics: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 'kl', least=0)
        check_range(self, 'statistics', least=1)


class Autoencoder(VAETraining[AutoencoderConfig]):
    """The training of a video autoencoder as a program of the loop."""

    name = 'autoencoder'

    def __init__(self, config: AutoencoderConfig, clips: Clips, cut: ClipsConfig) -> None:
        """Build the autoencoder, or read the stored one to continue from.

        Args:
          cut: size of the random cuts.
        Raises:
          InputError: the autoencoder or the weights of LPIPS cannot be read, or the cuts do not fit it.
        """
        module, self.start = _read_start(config.start) if config.start else (NativeVAE(config.sizes), None)
        super().__init__(config, module, clips, cut)
        self._reconstruct = jax.jit(self.reconstruct)

    def frozen(self) -> dict[str, Any]:
        """Return LPIPS, and the parameters to begin with or their linear part."""
        start = self.linear_start() if self.start is None else self.start
        return self.terms.frozen() | {'start': start}

    def linear_start(self) -> Any:
        """Return the linear part of new parameters, see `principal_start`."""
        return principal_layers(self.module.config, self.clips.training)

    def init_state(self, key: PRNGKeyArray, frozen: Any) -> AveragedState:
        """Return the state before the first step."""
        if self.start is None:
            return self.begin(fresh_autoencoder(self.module, key, frozen['start']))
        return self.begin(masters(frozen['start']))

    def loss(self, params: Any, frozen: Any, batch: Mapping[str, Array]) -> tuple[Float[Array, ''], dict[str, Array]]:
        """Return the loss of clips `video` with the posterior's `noise`, and its terms."""
        moments = self.encode(params, batch['video'])
        latents = posterior_sample(moments.astype(jnp.float32), batch['noise'])
        frames = self.decode(params, latents)
        loss, terms = self.terms(frozen, frames, batch['video'])
        divergence = prior_divergence(moments)
        return loss + self.config.kl * divergence, terms | {'kl': divergence}

    def encode(self, params: Any, video: Video) -> Moments:
        """Return the moments of clips."""
        with flat_convolutions(self.config.flat):
            return encode(self.module, params, video, self.config.memory)

    def decode(self, params: Any, latents: Latents) -> Video:
        """Return the clips of latents."""
        with flat_convolutions(self.config.flat):
            return decode(self.module, params, latents, self.config.memory)

    def reconstruct(self, params: Any, video: Video) -> Video:
        """Return the reconstruction of clips, without the posterior's noise."""
        return self.decode(params, posterior_mean(self.encode(params, video)))

    def evaluate(self, state: AveragedState, frozen: Any, folder: pathlib.Path) -> dict[str, float]:
        """Return PSNR and SSIM of held-out clips, and write some beside their originals."""
        del frozen
        ways = {'autoencoder': functools.partial(self._reconstruct, state.result)}
        return self.evaluation(ways, state.result, folder)

    def finish(self, state: AveragedState, folder: pathlib.Path) -> None:
        """Write the autoencoder with the latents' moments folded in, and `autoencoder.json` with these moments."""
        params, step = to_host((state.result, state.step))
        if jax.process_index() != 0:
            return
        encoder = functools.partial(jax.jit(self.encode), jax.device_put(params))
        params, folded = fit_and_fold(params, encoder, self._to_measure())
        checkpoint.save(folder / PYRAMID_FLOW_VAE, self.module, params)
        record = {'latents': folded.to_json(), 'parameters': count_parameters(params), 'iterations': int(step)}
        with atomic_file(folder / f'{self.name}.json') as path:
            path.write_text(json.dumps(self.metadata() | record, indent=2) + '\n')
        moments = ', '.join(f'{name} {value:.3f}' for name, value in folded.after._asdict().items())
        print(f'{self.name}: normalized latents after folding: {moments}')

    def metadata(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share: sizes, objective and data, but not learning rates."""
        return super().metadata() | {'kl': self.config.kl}

    def _to_measure(self) -> Iterator[Video]:
        """Yield training clips, on which the latents' moments are measured."""
        for index in range(min(self.config.statistics, len(self.clips.training))):
            clip = middle_cut(np.asarray(self.clips.training[index]['video']), self.cut)
            yield to_float(jnp.asarray(clip[None]))


def _read_start(folder: str) -> tuple[NativeVAE, Any]:
    """Return a stored autoencoder and its parameters."""
    return checkpoint.load(folder, NativeVAE)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of configs/autoencoder.py.

    Attributes:
      data: folder of clips, or shapes:WORLD for drawn ones, of train/shapes/world.py.
      workdir: folder of the run.
      seed: seed of parameters, data order and all randomness in steps.
    """

    data: str
    workdir: str
    seed: int
    autoencoder: AutoencoderConfig
    clips: ClipsConfig
    loop: LoopConfig


def load(settings: Settings) -> Training:
    """Return the training on stored or drawn clips.

    Raises:
      InputError: the data or the weights cannot be read, or do not fit the settings.
    """
    clips = open_clips(settings.data, settings.clips, settings.seed)
    program = Autoencoder(settings.autoencoder, clips, settings.clips)
    describe_terms(program)
    return Training(program, clips.training, settings.loop)


def abstract(settings: Settings) -> Training:
    """Return the training on blank clips, for a plan or for sizing; a named `start` and named LPIPS weights are read.

    Raises:
      InputError: they cannot be read.
    """
    program = Autoencoder(settings.autoencoder, blank_clips(settings.clips), settings.clips)
    if program.start is not None:
        program.start = as_shapes(program.start)
    else:
        linear = as_shapes(principal_layers(program.module.config, _blank_patch(program)))
        program.linear_start = lambda: linear
    return Training(program, program.clips.training, settings.loop)


def _blank_patch(program: Autoencoder) -> Repeated:
    """Return a clip of zeros as small as one latent number needs: the layers' shapes do not depend on the clips."""
    (frames, height, _), (latent_frames, latent_height, *_) = program.cut.size, program.latents
    length = (frames - 1) // max(latent_frames - 1, 1)
    side = height // latent_height
    return Repeated({'video': np.zeros((1 + length, side, side, 3), np.uint8)}, 1)


RECIPE = Recipe(Settings, load, abstract, required={'data': 'FOLDER of clips, or shapes:cpu', 'workdir': 'FOLDER'})
