"""Super-resolution: QuickSRNet learns to undo the reduction of frames.

    python -m train.super_resolution --config=configs/super_resolution.py --config.data=FOLDER --config.workdir=DIR

    loss = mean |QuickSRNet(small) - large|, in 0..1

Small pictures are large ones reduced by an antialiasing filter. The released checkpoint has no super-resolution
network; this trains one in the released layout.

Source: QuickSRNet, arXiv 2303.04336; used by Neodragon, arXiv 2511.06055.
Legend: B files of a batch, N crops of a file, h w and H W pixels of small and large crops.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.abstract import example_inputs
from neodragon_jax.config.super_resolution import variant
from neodragon_jax.models.super_resolution import QuickSRNet
from train.data.crops import CropConfig, CropSource
from train.data.sources import Repeated
from train.runtime.optimizer import AveragedState
from train.runtime.program import LoopConfig
from train.runtime.runner import Recipe, Training
from train.runtime.settings import check_range
from train.runtime.sharding import split_batch, to_host

# Folder of the result.
NETWORK = 'super_resolution'


@dataclasses.dataclass(frozen=True)
class SuperResolutionTraining:
    """Options of the objective.

    Attributes:
      variant: 'small', 'medium' or 'large'.
      scaling_factor: 2, 3 or 4.
      learning_rate: of Adam.
      decay_steps: steps in which the rate falls to 0 on a cosine; 0 keeps it constant.
      clip_norm: limit of the gradient's global norm.
    """

    variant: str = 'medium'
    scaling_factor: int = 2
    learning_rate: float = 5e-4
    decay_steps: int = 0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, 'learning_rate', 'decay_steps', least=0)
        check_range(self, 'clip_norm', above=0)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of configs/super_resolution.py.

    Attributes:
      data: folder of videos and pictures.
      workdir: folder of the run.
      seed: seed of parameters, data order and crops.
    """

    data: str
    workdir: str
    seed: int
    super_resolution: SuperResolutionTraining
    crops: CropConfig
    loop: LoopConfig

    @property
    def seeded_crops(self) -> CropConfig:
        """The crops, drawn from the seed of the run."""
        return dataclasses.replace(self.crops, seed=self.seed)


class SuperResolution:
    """The training of QuickSRNet as a program of the loop."""

    name = 'super_resolution'
    shown = ('loss', 'nearest_l1', 'psnr')

    def __init__(self, config: SuperResolutionTraining, data: Mapping[str, Any]) -> None:
        """Make the network.

        Args:
          data: JSON on the samples, on which a resumed run must agree.
        Raises:
          InputError: there is no such variant.
        """
        self.config, self.data = config, data
        self.module = QuickSRNet(variant(config.variant, config.scaling_factor))
        rate = optax.constant_schedule(config.learning_rate)
        if config.decay_steps:
            rate = optax.cosine_decay_schedule(config.learning_rate, config.decay_steps)
        self.tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.adam(rate))

    def frozen(self) -> dict[str, Any]:
        """Return nothing: all is trained."""
        return {}

    def init_state(self, key: PRNGKeyArray, frozen: Any) -> AveragedState:
        """Return a fresh network, near nearest-neighbor enlargement."""
        del frozen
        params = self.module.init(key, *example_inputs(self.module))['params']
        return AveragedState.begin(params, self.tx, ema_decay=0.0)

    def variant(self, step: int) -> int:
        """Return the only kind of step."""
        del step
        return 0

    def train_step(
        self, variant: int, state: AveragedState, frozen: Any, batch: Mapping[str, Array], key: PRNGKeyArray
    ) -> tuple[AveragedState, dict[str, Array]]:
        """Run one update; also report the loss of nearest-neighbor enlargement.

        Args:
          batch: small [B, N, h, w, 3] and large [B, N, H, W, 3], bytes.
        """
        del variant, frozen, key
        small, large = (_pictures(batch[name]) for name in ('small', 'large'))

        def loss_of(params: Any) -> tuple[Float[Array, ''], dict[str, Array]]:
            error = self.module.apply({'params': params}, small) - large  # pyright: ignore[reportOperatorIssue]
            loss = jnp.mean(jnp.abs(error))
            return loss, {'loss': loss, 'psnr': -10 * jnp.log10(jnp.mean(jnp.square(error)))}

        (_, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        nearest = _enlarged(small, self.config.scaling_factor)
        metrics |= {'grad_norm': optax.global_norm(grads), 'nearest_l1': jnp.mean(jnp.abs(nearest - large))}
        return state.updated(grads, self.tx, ema_decay=0.0), metrics

    def finish(self, state: AveragedState, folder: pathlib.Path) -> None:
        """Write the network in the released layout, and `super_resolution.json`."""
        params, step = to_host((state.params, state.step))
        if jax.process_index() != 0:
            return
        checkpoint.save(folder / NETWORK, self.module, params)
        with atomic_file(folder / f'{NETWORK}.json') as path:
            path.write_text(json.dumps(self.metadata() | {'iterations': int(step)}, indent=2) + '\n')

    def metadata(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share: network and data, but not learning rates."""
        return {name: getattr(self.config, name) for name in ('variant', 'scaling_factor')} | {'data': dict(self.data)}


def _pictures(crops: UInt8[Array, 'B N H W 3']) -> Float[Array, 'B*N H W 3']:
    """Return crops as one batch of pictures in [0, 1]."""
    return split_batch(crops.reshape(-1, *crops.shape[2:]).astype(jnp.float32) / 255)


def _enlarged(pictures: Float[Array, 'B*N h w 3'], factor: int) -> Float[Array, 'B*N H W 3']:
    """Return pictures enlarged by nearest neighbor."""
    return jnp.repeat(jnp.repeat(pictures, factor, axis=1), factor, axis=2)


def blank_crops(config: CropConfig, factor: int) -> Repeated:
    """Return black crops as `CropSource` has them, for a plan without data.

    Raises:
      InputError: the factor does not divide the size of a crop.
    """
    if config.size % factor:
        raise InputError(f'crop size {config.size} is no multiple of the scaling factor {factor}; choose one.')
    sides = {'small': config.size // factor, 'large': config.size}
    return Repeated({name: np.zeros((config.per_file, side, side, 3), np.uint8) for name, side in sides.items()}, 2**20)


def load(settings: Settings) -> Training:
    """Return the training on the files of a folder.

    Raises:
      InputError: the folder has no usable files, or a crop does not divide by the scaling factor.
    """
    source = CropSource(settings.data, settings.seeded_crops, settings.super_resolution.scaling_factor)
    return Training(SuperResolution(settings.super_resolution, source.metadata()), source, settings.loop)


def abstract(settings: Settings) -> Training:
    """Return the training on black crops, for a plan or for sizing."""
    source = blank_crops(settings.seeded_crops, settings.super_resolution.scaling_factor)
    return Training(SuperResolution(settings.super_resolution, {}), source, settings.loop)


RECIPE = Recipe(Settings, load, abstract, required={'data': 'FOLDER', 'workdir': 'FOLDER'})
