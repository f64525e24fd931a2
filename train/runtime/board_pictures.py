"""Samples of an evaluation in TensorBoard: contact sheets as pictures, videos as moving pictures (GIF)."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]  # made at import by protobuf

from neodragon_jax.base import video

# Samples per evaluation, largest side of a moving picture, and distance of its frames, to keep the log small.
SHOWN, LONGEST_PX, EVERY = 4, 320, 2


def summary_of(folder: pathlib.Path) -> Summary | None:
    """Return the first samples of an evaluation as TensorBoard's images; None if there are none.

    Args:
      folder: pictures NAME.png and videos NAME.mp4.
    """
    values = []
    for path in sorted(folder.glob('*.png'))[:SHOWN]:
        with Image.open(path) as picture:
            values.append(_value(f'samples/{path.stem}', path.read_bytes(), picture.size))
    for path in sorted(folder.glob('*.mp4'))[:SHOWN]:
        frames = [Image.fromarray(frame) for frame in _small(video.read_mp4(path))]
        values.append(_value(f'videos/{path.stem}', _gif(frames), frames[0].size))
    return Summary(value=values) if values else None


def _value(tag: str, encoded: bytes, size: tuple[int, int]) -> Summary.Value:
    """Return one image; `size` is width and height in pixels."""
    width, height = size
    image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=encoded)
    return Summary.Value(tag=tag, image=image)


def _small(frames: UInt8[np.ndarray, 'F H W 3']) -> UInt8[np.ndarray, 'f h w 3']:
    """Return every second frame, with rows and columns left out down to the largest side."""
    step = -(-max(frames.shape[1:3]) // LONGEST_PX)
    return np.ascontiguousarray(frames[::EVERY, ::step, ::step])


def _gif(frames: Sequence[Image.Image]) -> bytes:
    """Return frames as a GIF that repeats, at the speed of the video."""
    stream = io.BytesIO()
    milliseconds = round(1000 * EVERY / video.FPS)
    frames[0].save(stream, 'GIF', save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return stream.getvalue()
