"""Pairs of small and large pictures, cut from a folder of videos and pictures, for super-resolution.

Legend: N crops of a sample, H = W pixels of a large crop, h = w of the small one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from neodragon_jax.base.atomic import PathLike
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.video import read_image, read_mp4
from train.data.video_files import PICTURES, VIDEOS

# Both average over the area of a small pixel, which avoids aliasing.
FILTERS = {'lanczos': Image.Resampling.LANCZOS, 'bicubic': Image.Resampling.BICUBIC}


@dataclasses.dataclass(frozen=True)
class CropConfig:
    """Settings of the crops.

    Attributes:
      size: H, side of a large crop, a multiple of the scaling factor.
      per_file: N, crops cut from a file each time that it is read.
      rounds: times that each file is read, with different crops, before the crops repeat.
      filter: filter of the small pictures, 'lanczos' or 'bicubic'.
      seed: seed of the positions and orientations.
    """

    size: int = 128
    per_file: int = 8
    rounds: int = 1000
    filter: str = 'lanczos'
    seed: int = 0

    def __post_init__(self) -> None:
        if self.filter not in FILTERS:
            raise InputError(f'filter is {self.filter!r}; use one of {", ".join(FILTERS)}.')
        for name in ('size', 'per_file', 'rounds'):
            if getattr(self, name) < 1:
                raise InputError(f'{name} is {getattr(self, name)}; it must be at least 1.')


class CropSource:
    """Samples {'small': uint8 [N, h, w, 3], 'large': uint8 [N, H, W, 3]}, each from one file of a folder.

    A sample depends on the seed, its index and the file only.
    """

    def __init__(self, folder: PathLike, config: CropConfig, factor: int) -> None:
        """List the files, at any depth.

        Args:
          factor: scaling factor between small and large pictures.
        Raises:
          InputError: there is no file to cut from, or the factor does not divide the size of a crop.
        """
        self._folder, self.config, self._factor = pathlib.Path(folder), config, factor
        if config.size % factor:
            raise InputError(f'crop size {config.size} is no multiple of the scaling factor {factor}; choose one.')
        if not self._folder.is_dir():
            raise InputError(f'{folder}: no such folder. Give one with videos or pictures.')
        self._paths = sorted(path for path in self._folder.rglob('*') if path.suffix.lower() in VIDEOS + PICTURES)
        if not self._paths:
            raise InputError(f'{folder}: no {" or ".join(VIDEOS + PICTURES)} in it. Give a folder that has some.')

    def __len__(self) -> int:
        return len(self._paths) * self.config.rounds

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        path = self._paths[index % len(self._paths)]
        rng = np.random.default_rng((self.config.seed, index))
        clip = read_image(path)[None] if path.suffix.lower() in PICTURES else read_mp4(path)
        if min(clip.shape[1:3]) < self.config.size:
            height, width = clip.shape[1:3]
            raise InputError(f'{path} is {height}x{width}, smaller than a crop of {self.config.size}; remove it.')
        frames = rng.integers(len(clip), size=self.config.per_file)
        reduced = {frame: self._reduced(clip[frame]) for frame in np.unique(frames)}
        pairs = [self._crop(clip[frame], reduced[frame], rng) for frame in frames]
        small, large = (np.stack(side) for side in zip(*pairs, strict=True))
        return {'small': small, 'large': large}

    def metadata(self) -> dict[str, Any]:
        """Return JSON that is equal for sources of the same samples: the settings, and a hash of the files."""
        files = [f'{path.relative_to(self._folder)}\t{path.stat().st_size}' for path in self._paths]
        return dataclasses.asdict(self.config) | {'files': hashlib.sha256('\n'.join(files).encode()).hexdigest()[:16]}

    def _reduced(self, frame: UInt8[np.ndarray, 'H W 3']) -> UInt8[np.ndarray, 'h w 3']:
        """Return a frame reduced in size; trailing rows and columns that do not fill a small pixel are dropped."""
        height, width = (size // self._factor for size in frame.shape[:2])
        whole = Image.fromarray(frame[: height * self._factor, : width * self._factor])
        return np.asarray(whole.resize((width, height), FILTERS[self.config.filter]))

    def _crop(
        self, large: UInt8[np.ndarray, 'Y X 3'], small: UInt8[np.ndarray, 'y x 3'], rng: np.random.Generator
    ) -> tuple[UInt8[np.ndarray, 'h w 3'], UInt8[np.ndarray, 'H W 3']]:
        """Return the same random crop of a small and a large frame, both in the same one of eight orientations."""
        side = self.config.size // self._factor
        row, column = (int(rng.integers(size - side + 1)) for size in small.shape[:2])
        turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))

        def cut(frame: np.ndarray, factor: int) -> np.ndarray:
            crop = frame[row * factor :, column * factor :][: side * factor, : side * factor]
            crop = np.rot90(crop, turns)
            return crop[:, ::-1] if mirrored else crop

        return cut(small, 1), cut(large, self._factor)
