"""Safety check of first frames and videos: refused ones are made black; one refused frame refuses a video.

The checker is an optional component of a checkpoint, in the layout of Stable Diffusion's own release.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.files import is_there
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.checkpoint.params import read_params
from neodragon_jax.generation.param_store import Store
from neodragon_jax.models.safety_checker import Preparation, StableDiffusionSafetyChecker

SAFETY_CHECKER = 'safety checker'  # in a store
# Every eighth frame of a video is checked: one per latent frame.
STRIDE = 8
BLACK = -1.0  # in a first frame


@dataclasses.dataclass(frozen=True)
class SafetyChecker:
    """Safety checker of pictures.

    Attributes:
      prepare: pictures in bytes -> prepared pictures, the input of `classify`.
      classify: prepared pictures [B, S, S, 3] -> whether each is refused [B].
    """

    prepare: Preparation
    classify: Callable[[Any], Any]

    def frames(self, frames: Float[np.ndarray, 'B 1 H W 3']) -> tuple[Float[np.ndarray, 'B 1 H W 3'], np.ndarray]:
        """Return first frames in [-1, 1] with the refused ones black, and the mask of refused ones."""
        pictures = np.round((np.clip(frames[:, 0], -1, 1) + 1) * 127.5).astype(np.uint8)
        refused = self._refused(pictures)
        return np.where(refused[:, None, None, None, None], np.float32(BLACK), frames), refused

    def videos(self, clips: UInt8[np.ndarray, 'B F H W 3']) -> tuple[UInt8[np.ndarray, 'B F H W 3'], np.ndarray]:
        """Return videos with the refused ones black, and the mask of refused ones."""
        found = [self._refused(clips[:, index]) for index in range(0, clips.shape[1], STRIDE)]
        refused = np.any(found, axis=0)
        return np.where(refused[:, None, None, None, None], np.uint8(0), clips), refused

    def _refused(self, pictures: UInt8[np.ndarray, 'B H W 3']) -> Bool[np.ndarray, ' B']:
        return np.asarray(self.classify(self.prepare(pictures)))


def has_checker(root: str | os.PathLike[str]) -> bool:
    """Return whether a checkpoint has a safety checker.

    Raises:
      InputError: it has half of one: a broken link, or the preprocessing, which nothing else uses, without the checker.
    """
    folder = pathlib.Path(root) / folders.SAFETY_CHECKER
    if is_there(folder):
        return True
    if is_there(folder.with_name(folders.FEATURE_EXTRACTOR)):
        raise InputError(
            f'{folder}: no such folder, but {folders.FEATURE_EXTRACTOR}, which only it uses, is there. Copy it again, '
            f'remove {folders.FEATURE_EXTRACTOR}, or generate with --no-safety-checker.'
        )
    return False


def load(
    root: str | os.PathLike[str], store: Store, shard: Callable[[Any], Any] = lambda tree: tree
) -> SafetyChecker | None:
    """Load a checkpoint's safety checker, in float32 because scores are compared to three decimals; None if absent.

    Args:
      root: folder of the whole checkpoint.
      store: holds the parameters.
      shard: distributes a tree of arrays with a leading batch axis over devices.
    Raises:
      InputError: the component is damaged or of another class.
    """
    if not has_checker(root):
        return None
    folder = pathlib.Path(root) / folders.SAFETY_CHECKER
    module = checkpoint.load_module(folder, StableDiffusionSafetyChecker)
    prepare = Preparation.load(checkpoint.component_folder(root, folders.FEATURE_EXTRACTOR))
    if prepare.crop != module.config.image_size:
        raise InputError(
            f'{folder}: takes pictures of {module.config.image_size} pixels, {folders.FEATURE_EXTRACTOR} gives '
            f'{prepare.crop}. They belong to different models; copy both folders again.'
        )
    params = store.hold(SAFETY_CHECKER, lambda: _read(folder))
    module = module.clone(dtype=jnp.float32)
    classify = jax.jit(lambda params, pictures: module.apply({'params': params}, pictures))
    return SafetyChecker(prepare, lambda pictures: classify(params(), shard(pictures)))


def _read(folder: pathlib.Path) -> dict[str, Any]:
    """Read the parameters of a safety checker; check that every concept can be met."""
    params = read_params(folder, jnp.float32)
    for name in ('concepts', 'special_concepts'):
        # The cosine of a zero vector with any picture is NaN.
        if not np.all(np.linalg.norm(np.asarray(params[name], np.float64), axis=-1)):
            raise InputError(f'{folder}: a concept of {name} is all zeros, so the checker cannot work. Copy it again.')
    for name in ('concept_thresholds', 'special_thresholds'):
        # No cosine is above 1, so a picture would never be refused.
        if not np.all(np.asarray(params[name], np.float64) <= 1):
            raise InputError(
                f'{folder}: a value of {name} is above 1, which no picture reaches. Copy the checker again.'
            )
    return params
