"""Latents to frames and frames to mp4.

Legend: T latent frames, F video frames, h w latent grid, H W pixels, C channels.
"""

from __future__ import annotations

import pathlib
import tempfile
from typing import Any

import av
import av.codec
import av.video.reformatter
import numpy as np

from neodragon_phone.errors import BundleError
from neodragon_phone.output import reason_of, written
from neodragon_phone.player import Player, Sessions

_ENCODER = 'libx264'


def decode(player: Player, latents: np.ndarray) -> np.ndarray:
    """Return the frames of normalized latents [T, h, w, C], as bytes [F, H, W, 3]."""
    video = player.manifest['video']
    with player.phase('decoding') as graphs:
        run = graphs['video_decoder']
        inputs = player.manifest['graphs']['video_decoder']['inputs']
        memories = {name: np.zeros(tensor['shape'], np.float32) for name, tensor in inputs.items() if name != 'latent'}
        chunks = []
        for index, latent in enumerate(latents):
            outputs = run({'latent': denormalize(latent, index, video['normalization'])[None], **memories})
            memories = {name: outputs[f'next_{name}'] for name in memories}
            chunks.append(to_bytes(outputs['frames']))
            player.report(f'  latent frame {index} of {len(latents) - 1}')
        # The first latent stands for one frame of the video, its last.
        frames = np.concatenate(chunks)[video['frames_per_latent'] - 1 :]
        return _enlarge(graphs, frames) if player.has('super_resolution') else frames


def denormalize(latent: np.ndarray, index: int, statistics: Any) -> np.ndarray:
    """Return a latent frame as the decoder takes it."""
    kind = 'first_' if index == 0 else ''
    return latent / np.float32(statistics[f'{kind}scale']) + np.float32(statistics[f'{kind}shift'])


def to_bytes(frames: np.ndarray) -> np.ndarray:
    """Turn frames in [-1, 1] into bytes: clamp, scale, truncate.

    Raises:
      BundleError: a value is not a number.
    """
    if np.isnan(frames).any():
        raise BundleError('the decoder gives values that are not numbers; use --backend cpu, and report the chip.')
    return (np.clip(frames, -1, 1) * np.float32(127.5) + np.float32(127.5)).astype(np.uint8)


def _enlarge(graphs: Sessions, frames: np.ndarray) -> np.ndarray:
    """Return frames in the size of super-resolution."""
    run = graphs['super_resolution']
    enlarged = (run({'frame': frame[None].astype(np.float32) / 255})['enlarged'][0] for frame in frames)
    return np.stack([np.clip((frame * 255).round(), 0, 255).astype(np.uint8) for frame in enlarged])


def check_encoder() -> None:
    """Raise BundleError unless this installation of PyAV can encode videos."""
    try:
        av.codec.Codec(_ENCODER, 'w')
    except ValueError:
        raise BundleError(
            f'PyAV has no encoder {_ENCODER}. Install the one of PyPI: pip install --force-reinstall av'
        ) from None


def write_video(path: pathlib.Path, frames: np.ndarray, rate: int) -> None:
    """Write frames with `write_mp4`; if that fails, keep them in a file of NumPy.

    Raises:
      BundleError: the video cannot be written; the message names the file with its frames.
    """
    try:
        write_mp4(path, frames, rate)
    except BundleError as error:
        raise BundleError(f'{error} {_keep(frames)}') from None


def write_mp4(path: pathlib.Path, frames: np.ndarray, rate: int) -> None:
    """Write frames as H.264 in mp4, colors tagged BT.709; `path` appears when the file is complete.

    Raises:
      BundleError: the file cannot be written.
    """
    with (
        written(path, '--out') as draft,
        av.open(str(draft), 'w', format='mp4', options={'movflags': '+faststart'}) as container,
    ):
        stream = container.add_stream(_ENCODER, rate=rate, options={'crf': '16', 'preset': 'medium'})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], 'yuv420p'
        context = stream.codec_context
        context.colorspace = av.video.reformatter.Colorspace.ITU709
        context.color_primaries = av.video.reformatter.ColorPrimaries.BT709
        context.color_trc = av.video.reformatter.ColorTrc.BT709
        context.color_range = av.video.reformatter.ColorRange.MPEG
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format='rgb24')
            converted = frame.reformat(format='yuv420p', dst_colorspace='ITU709', dst_color_range='MPEG')
            container.mux(stream.encode(converted))
        container.mux(stream.encode())


def _keep(frames: np.ndarray) -> str:
    """Write frames to a new file in the system's temporary folder; return a sentence that names it."""
    try:
        with tempfile.NamedTemporaryFile(prefix='neodragon-', suffix='.npy', delete=False) as file:
            np.save(file, frames)
    except OSError as error:
        return f'Its frames are lost, as {tempfile.gettempdir()} cannot be written either ({reason_of(error)}).'
    return f'Its frames, bytes {list(frames.shape)}, are in {file.name}: numpy.load reads them.'
