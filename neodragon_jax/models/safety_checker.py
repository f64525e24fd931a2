"""Safety checker of Stable Diffusion: a classifier of pictures that must not be shown.

A picture's CLIP embedding is compared with stored embeddings of 17 concepts, each with its own threshold. Three
special concepts do not refuse a picture by themselves: they lower the other thresholds for pictures that match them.

Legend: B pictures, S side in pixels, D width, E embedding width, K concepts, k special concepts.
Source: Rando et al., Red-Teaming the Stable Diffusion Safety Filter, arXiv 2210.04610, section 3.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8
from PIL import Image
from pydantic import Field

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.files import is_there
from neodragon_jax.base.json_file import checked, read_json, shown
from neodragon_jax.config.component import Positive
from neodragon_jax.config.safety_checker import CONCEPTS, SPECIAL_CONCEPTS, SafetyCheckerConfig
from neodragon_jax.models.clip import CLIPLayer

# Decrease of the thresholds for a picture that resembles a special concept.
ADJUSTMENT = 0.01
# Scores are rounded to this many decimals before they are compared with zero.
DECIMALS = 3

Side = Annotated[int, Field(ge=1, le=2**13)]  # pixels
Color = tuple[float, float, float]
PositiveColor = tuple[Positive, Positive, Positive]

_SMALL, _ONES = nn.initializers.normal(0.02), nn.initializers.ones_init()


class StableDiffusionSafetyChecker(nn.Module):
    """CLIP vision tower and concept embeddings; pictures come prepared by `Preparation`."""

    config: SafetyCheckerConfig
    dtype: Any = None

    def setup(self) -> None:
        c, dtype = self.config, self.dtype
        norm, side = functools.partial(nn.LayerNorm, c.layer_norm_eps, dtype=dtype), (c.patch_size, c.patch_size)
        self.class_embedding = self.param('class_embedding', _SMALL, (c.hidden_size,))
        self.position_embedding = self.param('position_embedding', _SMALL, (c.tokens, c.hidden_size))
        self.patch_embed = nn.Conv(c.hidden_size, side, side, 'VALID', use_bias=False, dtype=dtype)
        self.pre_norm, self.post_norm = norm(), norm()
        self.layer = [CLIPLayer(c, dtype) for _ in range(c.num_hidden_layers)]
        self.projection = nn.Dense(c.projection_dim, use_bias=False, dtype=dtype)
        self.concepts = self.param('concepts', _SMALL, (CONCEPTS, c.projection_dim))
        self.special_concepts = self.param('special_concepts', _SMALL, (SPECIAL_CONCEPTS, c.projection_dim))
        self.concept_thresholds = self.param('concept_thresholds', _ONES, (CONCEPTS,))
        self.special_thresholds = self.param('special_thresholds', _ONES, (SPECIAL_CONCEPTS,))

    def __call__(self, pictures: Float[Array, 'B S S 3']) -> Bool[Array, ' B']:
        """Return True for refused pictures."""
        special = (self.special_concepts, self.special_thresholds)
        return refused(self.embed(pictures), self.concepts, self.concept_thresholds, *special)

    def embed(self, pictures: Float[Array, 'B S S 3']) -> Float[Array, 'B E']:
        """Return CLIP's embedding of pictures, in float32."""
        c = self.config
        patches = self.patch_embed(pictures).reshape(len(pictures), -1, c.hidden_size)
        first = jnp.broadcast_to(self.class_embedding.astype(patches.dtype), (len(pictures), 1, c.hidden_size))
        x = jnp.concatenate([first, patches], axis=1) + self.position_embedding.astype(patches.dtype)
        x = self.pre_norm(x)
        unmasked = jnp.zeros((c.tokens, c.tokens), jnp.float32)
        for layer in self.layer:
            x = layer(x, unmasked)
        return self.projection(self.post_norm(x[:, 0])).astype(jnp.float32)


def refused(
    pictures: Float[Array, 'B E'],
    concepts: Float[Array, 'K E'],
    thresholds: Float[Array, ' K'],
    special: Float[Array, 'k E'],
    special_thresholds: Float[Array, ' k'],
) -> Bool[Array, ' B']:
    """Return True for embeddings whose cosine with a concept exceeds its threshold."""
    strict = _exceeds(_cosine(pictures, special) - special_thresholds.astype(jnp.float32)).any(axis=1, keepdims=True)
    scores = _cosine(pictures, concepts) - thresholds.astype(jnp.float32) + jnp.where(strict, ADJUSTMENT, 0.0)
    return _exceeds(scores).any(axis=1)


def _cosine(left: Float[Array, 'B E'], right: Float[Array, 'K E']) -> Float[Array, 'B K']:
    """Return the cosine of every pair, in float32."""
    left, right = (x.astype(jnp.float32) for x in (left, right))
    left, right = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (left, right))
    return jnp.matmul(left, right.T, precision='highest')


def _exceeds(scores: Float[Array, 'B K']) -> Bool[Array, 'B K']:
    """Return True for scores that are positive after rounding, and for NaN."""
    return ~(jnp.round(scores * 10**DECIMALS) <= 0)


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Preprocessing of pictures: resize the shorter side, crop the center square, normalize as CLIP does.

    Attributes:
      resize: pixels of the shorter side after resizing (bicubic).
      crop: pixels of the square's side.
      mean, deviation: of each color, in [0, 1].
    """

    resize: int = 224
    crop: int = 224
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    deviation: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> Preparation:
        """Read `preprocessor_config.json` in a folder.

        Raises:
          InputError: the file is missing or damaged.
        """
        path = pathlib.Path(folder) / 'preprocessor_config.json'
        if not is_there(path):
            raise InputError(f'{path}: no such file. Copy the folder again, or use --no-safety-checker.')
        values = read_json(path, dict[str, Any], max_bytes=2**20)
        get = lambda name, kind: checked(values.get(name), kind, str(path), name)
        resize, crop = (_side(get(name, Side | dict[str, Side]), path, name) for name in ('size', 'crop_size'))
        if crop > resize:
            raise InputError(f'{path}: crop_size {crop} exceeds size {resize}; copy the file again.')
        return cls(resize, crop, get('image_mean', Color), get('image_std', PositiveColor))

    def __call__(self, pictures: UInt8[np.ndarray, 'B H W 3']) -> Float[np.ndarray, 'B S S 3']:
        """Prepare pictures."""
        return np.stack([self._prepare(picture) for picture in pictures])

    def _prepare(self, picture: UInt8[np.ndarray, 'H W 3']) -> Float[np.ndarray, 'S S 3']:
        height, width = picture.shape[:2]
        shorter = min(height, width)
        size = (width * self.resize // shorter, height * self.resize // shorter)
        resized = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
        left, top = ((edge - self.crop) // 2 for edge in size)
        square = resized.crop((left, top, left + self.crop, top + self.crop))
        pixels = np.asarray(square, np.float32) / np.float32(255)
        return (pixels - np.array(self.mean, np.float32)) / np.array(self.deviation, np.float32)


def _side(size: int | Mapping[str, int], path: pathlib.Path, name: str) -> int:
    """Return the side of a square that is given as a number, a shortest edge, or height and width."""
    if isinstance(size, int):
        return size
    sides = {size[key] for key in ('shortest_edge', 'height', 'width') if key in size}
    if len(sides) != 1:
        raise InputError(
            f'{path}: {name} is {shown(size)}; give one number, a shortest_edge, or equal height and width.'
        )
    return sides.pop()
