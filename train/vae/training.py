"""Common parts of the autoencoder and small decoder programs: options, update and random cuts.

Legend: B batch, T frames, H W pixels, t latent frames, h w latent grid, C latent channels.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, Generic, Self, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint.abstract import abstract_params
from train.data import DTYPES
from train.runtime.gradients import value_and_grad
from train.runtime.optimizer import AveragedState, OptimizerConfig, make_optimizer
from train.runtime.settings import check_range
from train.runtime.sharding import split_batch
from train.vae.clips import Clips, ClipsConfig, random_cuts
from train.vae.reconstruction import Evaluation, EvaluationConfig, Terms, TermsConfig
from train.vae.rematerialize import MemoryConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAETrainingConfig:
    """Options of both objectives.

    Attributes:
      terms: weights of the reconstruction terms.
      accumulate: parts of a batch whose gradients are computed one after the other, to save memory.
      ema_decay: decay of the averaged parameters, which are evaluated and saved; 0 turns the average off.
      dtype: compute type, 'float32' or 'bfloat16'; parameters and optimizer state stay float32.
      flat: compute causal convolutions in two dimensions: the same values, faster on CPUs (`flat_convolutions`).
    """

    terms: TermsConfig
    accumulate: int = 1
    ema_decay: float = 0.999
    dtype: str = 'bfloat16'
    flat: bool = False
    memory: MemoryConfig = dataclasses.field(default_factory=lambda: MemoryConfig(blocks=True))
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=1e-4))
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f'dtype is {self.dtype!r}; use one of {", ".join(DTYPES)}.')
        check_range(self, 'ema_decay', least=0, below=1)
        check_range(self, 'accumulate', least=1)


Options = TypeVar('Options', bound=VAETrainingConfig)


class VAETraining(Generic[Options]):
    """A program with one kind of step: an update of all trained parameters on random cuts of clips.

    A subclass defines `name` and `loss`.
    """

    name: str
    shown = ('loss', 'psnr', 'lpips', 'kl')

    def __init__(self, config: Options, module: nn.Module, clips: Clips, cut: ClipsConfig) -> None:
        """Read the weights of LPIPS, and build the optimizer.

        Args:
          module: a video VAE.
          cut: size of the random cuts.
        Raises:
          InputError: the weights of LPIPS cannot be read, or the cuts do not fit the VAE.
        """
        self.config, self.clips, self.cut = config, clips, cut
        dtype = DTYPES[config.dtype]
        self.module: Any = module.clone(dtype=dtype)  # pyright: ignore[reportCallIssue]
        self.latents = latent_shape(self.module, cut)
        self.terms = Terms(config.terms, dtype)
        self.tx = make_optimizer(config.optimizer, fixed=())
        self.evaluation = Evaluation(config.evaluation, clips)

    def plain(self) -> Self:
        """Return the program without recomputation, itself if it has none."""
        config = dataclasses.replace(self.config, accumulate=1, memory=MemoryConfig())
        if config == self.config:
            return self
        plain = copy.copy(self)
        plain.config = config
        return plain

    def begin(self, params: Any) -> AveragedState:
        """Return the state before the first step."""
        return AveragedState.begin(params, self.tx, self.config.ema_decay)

    def variant(self, step: int) -> int:
        """Return the only kind of step."""
        del step
        return 0

    def train_step(
        self, variant: int, state: AveragedState, frozen: Any, batch: Mapping[str, Array], key: PRNGKeyArray
    ) -> tuple[AveragedState, dict[str, Array]]:
        """Run one update.

        Args:
          batch: video [B, T, H, W, 3], bytes.
        """
        del variant
        batch = cut_batch(batch['video'], self.cut, self.latents, key)
        loss_of = lambda params, batch, key: self.loss(params, frozen, batch)
        (loss, metrics), grads = value_and_grad(loss_of, state.params, batch, key, self.config.accumulate)
        metrics = {'loss': loss, 'grad_norm': optax.global_norm(grads)} | metrics
        return state.updated(grads, self.tx, self.config.ema_decay), metrics

    def loss(self, params: Any, frozen: Any, batch: Mapping[str, Array]) -> tuple[Float[Array, ''], dict[str, Array]]:
        """Return the loss of clips `video` with the posterior's `noise`, and its terms."""
        raise NotImplementedError

    def metadata(self) -> dict[str, Any]:
        """Return the settings common to both programs that a resumed run must share."""
        terms = {name: value for name, value in vars(self.config.terms).items() if name != 'lpips_weights'}
        terms['with_lpips'] = bool(self.config.terms.lpips_weights)
        sizes = self.module.config.to_json()
        return {'ema_decay': self.config.ema_decay, 'terms': terms, 'sizes': sizes, 'data': self.clips.metadata}


def cut_batch(
    videos: Array, cut: ClipsConfig, latents: tuple[int, int, int, int], key: PRNGKeyArray
) -> dict[str, Array]:
    """Return random cuts of clips as `video`, and `noise` for the posterior; both depend on the key only."""
    cut_key, noise_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (videos.shape[0], *latents))
    return {'video': random_cuts(videos, cut, cut_key), 'noise': split_batch(noise)}


def latent_shape(module: Any, cut: ClipsConfig) -> tuple[int, int, int, int]:
    """Return [t, h, w, C] of a cut's latents.

    Raises:
      InputError: the frames or pixels of the cut do not divide into latents.
    """
    params = abstract_params(module)
    clip = jax.ShapeDtypeStruct((1, *cut.size, 3), jnp.float32)
    moments = jax.eval_shape(lambda params, clip: module.apply({'params': params}, clip, method='encode'), params, clip)
    return (*moments.shape[1:-1], moments.shape[-1] // 2)


def abstract(tree: Any) -> Any:
    """Return parameters as shapes and types."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def describe_terms(program: VAETraining[Any]) -> None:
    """Print the terms of a program's loss, on process 0."""
    if jax.process_index() == 0:
        print(f'{program.name}: {program.terms.describe()}')
