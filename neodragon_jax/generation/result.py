"""A generated video in memory, with its prompt and seed."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import pathlib
import tempfile

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from neodragon_jax.base import video
from neodragon_jax.base.atomic import PathLike
from neodragon_jax.base.bucket import StoragePath
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.paths import storage_path


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
    """Generated video. A notebook shows a player, or the contact sheet if it shows no HTML.

    Attributes:
      frames: RGB bytes, uint8 [T, H, W, 3].
      prompt: its prompt, without modifier.
      seed: seed of its random numbers.
      number: sample number among the videos of one prompt and seed.
      refused: whether the safety checker refused the video or its first frame, which is then black.
      fps: frames per second.
    """

    frames: UInt8[np.ndarray, 'T H W 3'] = dataclasses.field(repr=False)
    prompt: str
    seed: int
    number: int = 0
    refused: bool = False
    fps: int = video.FPS

    def save(self, path: PathLike) -> StoragePath:
        """Write the video as H.264 in mp4, also into a bucket; return the path. The file appears when it is complete.

        Raises:
          InputError: the name does not end in .mp4, the path is a folder, or one of its parents is a file.
        """
        path = storage_path(path, 'path')
        if path.suffix.lower() != '.mp4':
            raise InputError(f'path {path}: give a name that ends in .mp4.')
        video.write_mp4(path, self.frames, fps=self.fps)
        return path

    def contact_sheet(self, columns: int = 4, tiles: int = 12) -> Image.Image:
        """Return evenly spaced frames, first and last included, as one picture with their indices and times."""
        return video.contact_sheet(self.frames, columns, tiles, self.fps)

    def _repr_png_(self) -> bytes:
        """Return the contact sheet as PNG, for notebooks that show no HTML."""
        buffer = io.BytesIO()
        self.contact_sheet().save(buffer, format='PNG')
        return buffer.getvalue()

    def _repr_html_(self) -> str:
        """Return a player with the prompt below it, for notebooks."""
        with tempfile.TemporaryDirectory() as folder:
            content = self.save(pathlib.Path(folder) / 'video.mp4').read_bytes()
        source = f'data:video/mp4;base64,{base64.b64encode(content).decode()}'
        note = ' (refused by the safety checker)' if self.refused else ''
        return (
            f'<figure><video controls loop autoplay muted src="{source}"></video>'
            f'<figcaption>{html.escape(self.prompt)}, seed {self.seed}{note}</figcaption></figure>'
        )
