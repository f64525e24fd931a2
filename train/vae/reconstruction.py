"""Differences between reconstructed and original clips: the terms of a loss, and the evaluation on held-out clips.

Legend: B clips, T frames, H W pixels, V held-out clips.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from neodragon_jax.base import video
from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.errors import InputError
from neodragon_jax.models.vae import Video
from train.runtime.settings import PathText, check_range
from train.runtime.sharding import place, to_host
from train.vae.clips import Clips
from train.vae.perceptual import edge_error, load_lpips

# PSNR in dB reported for identical clips, where the definition is infinite.
BEST_PSNR_DB = 100.0
PER_CLIP = 'clips.json'

Bytes = UInt8[np.ndarray, 'T H W 3']


@dataclasses.dataclass(frozen=True)
class TermsConfig:
    """Weights of the differences between reconstruction and original, both in [-1, 1].

    Attributes:
      absolute, square: weights of the mean absolute and the mean squared difference.
      edges: weight of `perceptual.edge_error`, the replacement for LPIPS without its weights file.
      lpips: weight of LPIPS, mean over frames.
      lpips_weights: weights file, see train/vae/perceptual.py; '' trains without LPIPS.
    """

    absolute: float = 0.0
    square: float = 0.0
    edges: float = 0.0
    lpips: float = 0.0
    lpips_weights: PathText = ''

    def __post_init__(self) -> None:
        names = ('absolute', 'square', 'edges', 'lpips')
        for name in names:
            if getattr(self, name) < 0:
                raise InputError(f'{name} is {getattr(self, name)}; weights are at least 0.')
        if self.lpips_weights and not self.lpips:
            raise InputError('lpips_weights is given, but lpips is 0; give it a weight, such as 1.')
        if not (self.absolute or self.square):
            raise InputError('absolute and square are both 0; weigh one of them, or colors are not learned.')


class Terms:
    """The loss of reconstructions, a weighted sum."""

    def __init__(self, config: TermsConfig, dtype: Any = None) -> None:
        """Read LPIPS if there is a file.

        Args:
          dtype: compute type of LPIPS.
        Raises:
          InputError: the file cannot be read.
        """
        self.config, self._module, self._params = config, None, None
        if config.lpips_weights:
            self._module, self._params = load_lpips(config.lpips_weights, dtype)

    def frozen(self) -> dict[str, Any]:
        """Return the parameters that `__call__` needs."""
        return {} if self._params is None else {'lpips': self._params}

    def __call__(self, frozen: Mapping[str, Any], got: Video, want: Video) -> tuple[Float[Array, ''], dict[str, Array]]:
        """Return the weighted sum, and the terms with `psnr` in dB, in float32.

        Args:
          frozen: a mapping with the entries that the method `frozen` returns.
        """
        config, error = self.config, (got - want).astype(jnp.float32)
        square = jnp.mean(jnp.square(error))
        terms = {'absolute': jnp.mean(jnp.abs(error)), 'square': square}
        if config.edges:
            terms['edges'] = edge_error(got, want)
        if self._module is not None:
            terms['lpips'] = self._lpips(frozen['lpips'], got, want)
        loss = sum((getattr(config, name) * value for name, value in terms.items()), jnp.zeros(()))
        return loss, terms | {'psnr': -10 * jnp.log10(jnp.maximum(square / 4, 10 ** (-BEST_PSNR_DB / 10)))}

    def _lpips(self, params: Any, got: Video, want: Video) -> Float[Array, '']:
        """Return LPIPS, mean over frames, computed frame by frame and rematerialized to save memory."""

        @jax.checkpoint
        def of_frame(pair: tuple[Array, Array]) -> Array:
            return self._module.apply({'params': params}, *pair)  # pyright: ignore[reportOptionalMemberAccess, reportReturnType]

        return jnp.mean(jax.lax.map(of_frame, (jnp.moveaxis(got, 1, 0), jnp.moveaxis(want, 1, 0))))

    def describe(self) -> str:
        """Return the loss in words, and whether LPIPS is missing."""
        config, names = self.config, ['absolute', 'square', 'edges']
        names += ['lpips'] if self._module is not None else []
        loss = ' + '.join(f'{getattr(config, name):g} {name}' for name in names if getattr(config, name))
        if self._module is None:
            return f'loss {loss}; WITHOUT LPIPS: lpips_weights is empty (see train/vae/perceptual.py)'
        return f'loss {loss}; LPIPS by {self._module.network} from {config.lpips_weights}'


class Quality(NamedTuple):
    """Similarity of two clips: means over frames."""

    psnr: float
    ssim: float


def quality(got: Bytes, want: Bytes) -> Quality:
    """Return PSNR in dB, at most 100, and SSIM, at most 1, of clips as bytes."""
    psnr, ssim = _quality(got, want)
    return Quality(float(psnr), float(ssim))


@jax.jit
def _quality(got: UInt8[Array, 'T H W 3'], want: UInt8[Array, 'T H W 3']) -> tuple[Array, Array]:
    got, want = got.astype(jnp.float32) / 255, want.astype(jnp.float32) / 255
    return jnp.mean(jnp.minimum(dm_pix.psnr(got, want), BEST_PSNR_DB)), jnp.mean(jnp.asarray(dm_pix.ssim(got, want)))


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation of held-out clips.

    Attributes:
      batch: clips at a time.
      videos: clips to write, original and reconstructions side by side.
    """

    batch: int = 8
    videos: int = 4

    def __post_init__(self) -> None:
        check_range(self, 'batch', least=1)
        check_range(self, 'videos', least=0)


class Evaluation:
    """Evaluation of reconstructions of fixed held-out clips, rounded to bytes as in a file."""

    def __init__(self, config: EvaluationConfig, clips: Clips) -> None:
        self.config, self.clips, self.read = config, clips.held_out, clips.read

    def __call__(
        self, ways: Mapping[str, Callable[[Video], Video]], params: Any, folder: pathlib.Path
    ) -> dict[str, float]:
        """Return the quality of each reconstruction method; write the clips and their quality into `folder`.

        The first method is compared with the originals as `psnr`, `psnr_worst` (of all clips) and `ssim`. Any other
        method NAME is `NAME_psnr` and so on, and `psnr_to_NAME` compares the first method with it. Attributes read from
        clips (`Clips.read`) are reported in the same way, for scenes as shares such as `shape_right`. Every process
        must call this.

        Args:
          ways: name -> function of clips in [-1, 1].
          params: parameters, on the mesh of the functions.
        """
        rows: list[dict[str, float]] = []
        for start in range(0, len(self.clips), self.config.batch):
            want = self.clips[start : start + self.config.batch]
            batch = place(want.astype(np.float32) / 127.5 - 1, params)
            got = {name: to_host(way(batch)) for name, way in ways.items()}
            if jax.process_index() == 0:
                for row in range(len(want)):
                    clips = {name: video.to_uint8(frames[row]) for name, frames in got.items()}
                    self._write(start + row, want[row], clips, folder)
                    rows.append(_judge(want[row], clips) | self._read(start + row, clips))
        if not rows:
            return {}
        with atomic_file(folder / PER_CLIP) as path:
            path.write_text(json.dumps(rows, indent=2) + '\n')
        means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        return means | {'psnr_worst': min(row['psnr'] for row in rows)}

    def _read(self, index: int, got: Mapping[str, Bytes]) -> dict[str, float]:
        """Return the attributes read from one clip's reconstructions."""
        if self.read is None:
            return {}
        values = {}
        for name, clip in got.items():
            prefix = f'{name}_' if values else ''
            values |= {prefix + key: value for key, value in self.read(index, clip).items()}
        return values

    def _write(self, index: int, want: Bytes, got: Mapping[str, Bytes], folder: pathlib.Path) -> None:
        """Write a clip, the original on the left, as a video and as a contact sheet."""
        if index >= self.config.videos:
            return
        frames = np.concatenate([want, *got.values()], axis=2)
        video.write_mp4(folder / f'{index:03d}.mp4', frames)
        video.write_contact_sheet(folder / f'{index:03d}.png', frames, columns=2, tiles=6)


def _judge(want: Bytes, got: Mapping[str, Bytes]) -> dict[str, float]:
    """Return the quality of one clip's reconstructions."""
    (_, first), *others = got.items()
    values = quality(first, want)._asdict()
    for name, clip in others:
        values |= {f'{name}_{key}': value for key, value in quality(clip, want)._asdict().items()}
        values |= {f'{key}_to_{name}': value for key, value in quality(first, clip)._asdict().items()}
    return values
