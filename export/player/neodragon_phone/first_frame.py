"""The first frame: a picture from a file or drawn from the prompt, as a latent.

Legend: H W pixels, h w latent grid, C channels, L tokens.
"""

from __future__ import annotations

import math
import pathlib
from typing import Any

import av
import av.error
import numpy as np

from neodragon_phone import noise
from neodragon_phone.errors import BundleError
from neodragon_phone.player import Player
from neodragon_phone.text import tower_inputs

# Pillow's fixed-point precision of resampling weights.
_WEIGHT_BITS = 22


def encode_picture(player: Player, frame: np.ndarray, seed: int) -> np.ndarray:
    """Return the normalized latent [h, w, C] of a frame [H, W, 3] in [-1, 1]: a sample of the encoder's posterior."""
    statistics = player.manifest['video']['normalization']
    with player.phase('first frame') as graphs:
        outputs = graphs['video_encoder']({'picture': frame[None]})
    mean, log_variance = outputs['mean'][0], outputs['log_variance'][0]
    low, high = (np.float32(limit) for limit in statistics['log_variance_range'])
    deviation = np.exp(np.clip(log_variance, low, high) / 2)
    latent = mean + deviation * noise.normals(seed, noise.POSTERIOR, 0, 0, mean.shape)
    return (latent - np.float32(statistics['first_shift'])) * np.float32(statistics['first_scale'])


def read_frame(path: pathlib.Path, height: int, width: int) -> np.ndarray:
    """Return a picture file as a frame [H, W, 3] in [-1, 1], cropped at the center.

    Raises:
      BundleError: the file is not a picture.
    """
    try:
        with av.open(str(path)) as container:
            picture = next(container.decode(video=0)).to_ndarray(format='rgb24')
    except (av.error.FFmpegError, OSError, StopIteration, IndexError):
        raise BundleError(f'{path}: cannot be read as a picture. Give a PNG or JPEG file.') from None
    return to_frame(crop_center(picture, height, width), height, width)


def crop_center(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the largest centered part of a picture with the shape of height x width."""
    rows, columns, _ = picture.shape
    tall = min(rows, max(1, round(columns * height / width)))
    wide = min(columns, max(1, round(rows * width / height)))
    top, left = (rows - tall) // 2, (columns - wide) // 2
    return picture[top : top + tall, left : left + wide]


def to_frame(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return RGB bytes resized to a frame [H, W, 3] in [-1, 1]."""
    return resize(picture, height, width).astype(np.float32) / np.float32(127.5) - 1


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize RGB bytes with a Lanczos filter, as Pillow does: along rows, then along columns, in whole numbers."""
    for axis, size in ((1, width), (0, height)):
        if picture.shape[axis] != size:
            picture = _resize_axis(picture, axis, size)
    return picture


def _resize_axis(picture: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Resize one axis of bytes."""
    length = picture.shape[axis]
    scale = length / size
    stretch = max(scale, 1.0)
    weights = np.zeros((size, length))
    for index in range(size):
        center = (index + 0.5) * scale
        low, high = max(int(center - 3 * stretch + 0.5), 0), min(int(center + 3 * stretch + 0.5), length)
        row = np.array([_lanczos((at - center + 0.5) / stretch) for at in range(low, high)])
        weights[index, low:high] = row / row.sum()
    whole = np.trunc(weights * (1 << _WEIGHT_BITS) + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)
    moved = np.moveaxis(picture.astype(np.int64), axis, 0)
    sums = np.tensordot(whole, moved, axes=1) + (1 << (_WEIGHT_BITS - 1))
    return np.moveaxis(np.clip(sums >> _WEIGHT_BITS, 0, 255).astype(np.uint8), 0, axis)


def _lanczos(x: float) -> float:
    """Return the Lanczos kernel with three lobes."""
    if not -3 <= x < 3:
        return 0.0
    sinc = lambda value: 1.0 if value == 0 else math.sin(math.pi * value) / (math.pi * value)
    return sinc(x) * sinc(x / 3)


def draw_frame(player: Player, prompt: str, seed: int) -> np.ndarray:
    """Return a first frame [H, W, 3] in [-1, 1], drawn from the prompt (modifier included)."""
    entry, bundle = player.manifest['first_frame'], player.bundle
    with player.phase('picture text') as graphs:
        feeds = {name: tower_inputs(bundle, tower, prompt) for name, tower in entry['towers'].items()}
        del feeds['first_frame_clip_l']['end']
        outputs = {name: graphs[name](feeds[name]) for name in feeds}
    text = np.concatenate([outputs[name]['states'] for name in ('first_frame_clip_l', 'first_frame_clip_g')], axis=-1)
    embeddings = _embeddings(player, entry, outputs['first_frame_clip_g']['pooled'])
    latent = _draw_latent(player, entry, text, embeddings, seed)
    with player.phase('picture decoding') as graphs:
        scaled = latent / np.float32(entry['scaling_factor'])
        pixels = graphs['first_frame_decoder']({'latent': scaled[None]})['picture'][0]
    if np.isnan(pixels).any():
        raise BundleError('the first frame has values that are not numbers; use --backend cpu, and report the chip.')
    picture = np.round(np.clip(pixels / 2 + np.float32(0.5), 0, 1) * 255).astype(np.uint8)
    video = player.manifest['video']
    return to_frame(picture, video['height'], video['width'])


def _embeddings(player: Player, entry: Any, pooled: np.ndarray) -> np.ndarray:
    """Return the UNet's embedding of each step, [S, E]."""
    tables = {name: np.asarray(player.bundle.table(table)) for name, table in entry['embedding'].items()}
    try:
        hidden = _silu(pooled.reshape(1, -1) @ tables['hidden_kernel'] + tables['hidden_bias'])
        embeddings = _silu(tables['step'] + hidden @ tables['output_kernel'])
        return embeddings.reshape(len(entry['steps']), -1)
    except ValueError:
        raise BundleError(
            'manifest.json: the tables of "first_frame.embedding" do not fit. Copy the bundle again.'
        ) from None


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _draw_latent(player: Player, entry: Any, text: np.ndarray, embeddings: np.ndarray, seed: int) -> np.ndarray:
    """Return the latent of the picture, [h, w, C], in steps of a consistency model (arXiv 2310.04378, equation 9)."""
    shape = tuple(entry[f'latent_{side}'] for side in ('height', 'width', 'channels'))
    x = noise.normals(seed, noise.PICTURE, 0, 0, shape)
    with player.phase('picture') as graphs:
        for number, (step, embedding) in enumerate(zip(entry['steps'], embeddings, strict=True)):
            feeds = {'latent': x[None], 'text': text, 'embedding': embedding[None]}
            predicted = graphs['first_frame_unet'](feeds)['noise'][0]
            number32 = {name: np.float32(step[name]) for name in ('signal', 'noise', 'keep', 'take')}
            clean = (x - number32['noise'] * predicted) / number32['signal']
            x = number32['take'] * clean + number32['keep'] * x
            if step['next'] is not None:
                more = noise.normals(seed, noise.PICTURE_STEP, number, 0, shape)
                x = np.float32(step['next']['signal']) * x + np.float32(step['next']['noise']) * more
            player.report(f'  picture step {number + 1} of {len(entry["steps"])}')
    return x
