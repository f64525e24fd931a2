"""Clips and pictures as files: mp4 in and out, contact sheets, and the first frame's picture.

Legend: T frames, H W pixels, S any shape.
"""

from __future__ import annotations

import fractions
import math
from collections.abc import Iterator

import av
import av.video.reformatter
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

from neodragon_jax.base.atomic import PathLike, atomic_file
from neodragon_jax.base.color_profile import take_tags, to_srgb
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.files import is_system_error, naming
from neodragon_jax.base.video_stream import Unusable, open_video

# x264's constant quality, 0 (lossless) to 51; at 16 the loss is hard to see.
_X264_OPTIONS = {'crf': '16', 'preset': 'medium'}

FPS = 24  # frame rate of the system's videos
# Larger pictures are rejected before decoding: decoded, they may be a thousand times larger than their file.
MAX_PIXELS = 2**26
BACKGROUND = 'white'  # under transparent pictures
# Without those that may hold HDR, whose transfer curve Pillow ignores.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM')

_TILE_WIDTHS = (192, 384)  # pixels: narrower tiles are enlarged, wider ones reduced
_MARGIN, _LABEL = 6, 20  # pixels


def to_uint8(frames: Float[Array | np.ndarray, '*S']) -> UInt8[np.ndarray, '*S']:
    """Turn frames in [-1, 1] into bytes: clamp, scale to [0, 255], and truncate, as the released system does.

    Raises:
      InputError: a value is not a number.
    """
    frames = np.asarray(frames, np.float32)
    if np.isnan(frames).any():
        raise InputError('frames have values that are not numbers; check the weights, or compute in float32.')
    return (np.clip(frames, -1, 1) * np.float32(127.5) + np.float32(127.5)).astype(np.uint8)


def write_mp4(path: PathLike, frames: UInt8[np.ndarray, 'T H W 3'], fps: int | float = FPS) -> None:
    """Write a clip as H.264 in mp4, colors tagged BT.709; `path` appears when the file is complete.

    Raises:
      InputError: the frames are not RGB bytes, there are none, their size is odd, or `fps` is not positive.
    """
    _check_rgb('frames', frames, rank=4)
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise InputError(f'frames are {height} high and {width} wide; mp4 needs even sizes: crop or pad by one pixel.')
    if fps <= 0:
        raise InputError(f'fps is {fps}; give a positive number.')
    # The index comes first, so that a browser can start playback before the download ends.
    options = {'movflags': '+faststart'}
    with atomic_file(path) as temporary, av.open(str(temporary), 'w', format='mp4', options=options) as container:
        rate = fractions.Fraction(fps).limit_denominator(1001)
        stream = container.add_stream('libx264', rate=rate, options=_X264_OPTIONS)
        stream.width, stream.height, stream.pix_fmt = width, height, 'yuv420p'
        context = stream.codec_context
        context.colorspace = av.video.reformatter.Colorspace.ITU709
        context.color_primaries = av.video.reformatter.ColorPrimaries.BT709
        context.color_trc = av.video.reformatter.ColorTrc.BT709
        context.color_range = av.video.reformatter.ColorRange.MPEG
        for frame in _video_frames(frames):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _video_frames(frames: UInt8[np.ndarray, 'T H W 3']) -> Iterator[av.VideoFrame]:
    """Yield frames in the encoder's colors. Without the explicit matrix FFmpeg would use BT.601."""
    for pixels in frames:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format='rgb24')
        yield frame.reformat(format='yuv420p', dst_colorspace='ITU709', dst_color_range='MPEG')


def read_mp4(path: PathLike) -> UInt8[np.ndarray, 'T H W 3']:
    """Read all frames of a clip as a player shows them, in stored pixels; see `base.video_stream`.

    Raises:
      InputError: the file cannot be read or shown correctly, has no video, or is truncated.
    """
    try:
        with open_video(path) as stream:
            return np.stack([frame.pixels() for frame in stream.frames()])
    except Unusable as problem:
        raise InputError(
            f'{path} cannot be read as a video ({problem}); copy it again, or re-encode it as mp4.'
        ) from None
    except OSError as error:
        raise InputError(f'{path} cannot be read ({error.strerror}); correct the path, or check the disk.') from None


def write_contact_sheet(
    path: PathLike, frames: UInt8[np.ndarray, 'T H W 3'], columns: int = 4, tiles: int = 12, fps: int | float = FPS
) -> None:
    """Write the contact sheet of a clip as PNG; arguments and errors as in `contact_sheet`."""
    sheet = contact_sheet(frames, columns, tiles, fps)
    with atomic_file(path) as temporary:
        sheet.save(temporary, format='PNG')


def contact_sheet(
    frames: UInt8[np.ndarray, 'T H W 3'], columns: int = 4, tiles: int = 12, fps: int | float = FPS
) -> Image.Image:
    """Return evenly spaced frames of a clip, first and last included, as one picture, each with its index and time.

    Args:
      columns: tiles in a row.
      tiles: frames shown, at most all.
      fps: frames per second, for the times.
    Raises:
      InputError: the frames are not RGB bytes, or there are none.
    """
    _check_rgb('frames', frames, rank=4)
    _, height, width, _ = frames.shape
    shown = np.linspace(0, len(frames) - 1, min(tiles, len(frames))).round().astype(int)
    tile_width = int(np.clip(width, *_TILE_WIDTHS))
    tile_height = round(height * tile_width / width)
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    step_x, step_y = tile_width + _MARGIN, tile_height + _LABEL + _MARGIN
    sheet = Image.new('RGB', (columns * step_x + _MARGIN, rows * step_y + _MARGIN), 'white')
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    # Enlarging repeats pixels; reducing averages them.
    method = Image.Resampling.NEAREST if tile_width > width else Image.Resampling.LANCZOS
    for position, index in enumerate(shown):
        x, y = _MARGIN + position % columns * step_x, _MARGIN + position // columns * step_y
        sheet.paste(Image.fromarray(frames[index]).resize((tile_width, tile_height), method), (x, y + _LABEL))
        draw.text((x, y + 2), f'frame {index}, {index / fps:.2f} s', fill='black', font=font)
    return sheet


def read_image(path: PathLike) -> UInt8[np.ndarray, 'H W 3']:
    """Read a picture as sRGB bytes, upright by its orientation tag; transparent areas become white.

    Raises:
      InputError: the file cannot be read, has more than 8 bits per color, more than MAX_PIXELS pixels, or tags of other
        colors than sRGB; profiles are converted.
    """
    try:
        return decode_image(path)
    except OSError as error:
        raise InputError(f'{path} cannot be read as a picture ({error.strerror}); give a PNG or JPEG file.') from None


def decode_image(path: PathLike) -> UInt8[np.ndarray, 'H W 3']:
    """Return a picture as `read_image` does, which see.

    Raises:
      InputError: the content of the file is not as it must be.
      OSError: the system cannot read the file, which may be good; it names the file.
    """
    try:
        with naming(path), Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f'{path} has {image.width}x{image.height} pixels, more than {MAX_PIXELS}; save it smaller.'
                )
            if image.mode.startswith(('I', 'F')):
                raise InputError(f'{path} has more than 8 bits per color (mode {image.mode}); save it as 8-bit RGB.')
            if other := take_tags(image, path):
                raise InputError(f'{path} has other colors than sRGB ({other}); convert it to sRGB.')
            upright = to_srgb(ImageOps.exif_transpose(image))
            if upright.mode == 'RGBA':
                upright = Image.alpha_composite(Image.new('RGBA', upright.size, BACKGROUND), upright)
            return np.array(upright.convert('RGB'))
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f'{path} has more than {MAX_PIXELS} pixels; save it smaller.') from None
    except (OSError, ValueError, SyntaxError) as error:  # a damaged PNG or TIFF is a ValueError or SyntaxError
        if is_system_error(error):
            raise
        raise InputError(
            f'{path} cannot be read as a picture (not a picture, or damaged); give a PNG or JPEG file.'
        ) from None


def crop_center(image: UInt8[np.ndarray, 'h w 3'], height: int, width: int) -> UInt8[np.ndarray, 'h_ w_ 3']:
    """Return the largest centered part of a picture with the shape of height x width, so that resizing keeps circles.

    Raises:
      InputError: the picture is not RGB bytes.
    """
    _check_rgb('image', image, rank=3)
    rows, columns, _ = image.shape
    tall = min(rows, max(1, round(columns * height / width)))
    wide = min(columns, max(1, round(rows * width / height)))
    top, left = (rows - tall) // 2, (columns - wide) // 2
    return image[top : top + tall, left : left + wide]


def picture_to_frame(picture: UInt8[np.ndarray, 'h w 3'], height: int, width: int) -> Float[np.ndarray, 'H W 3']:
    """Return a user's picture as a first frame: cropped at the center to the video's shape, resized, in [-1, 1].

    Raises:
      InputError: the picture is not RGB bytes.
    """
    return image_to_frame(crop_center(picture, height, width), height, width)


def image_to_frame(image: UInt8[np.ndarray, 'h w 3'], height: int, width: int) -> Float[np.ndarray, 'H W 3']:
    """Resize a picture with a Lanczos filter, in bytes, and scale it to [-1, 1].

    Raises:
      InputError: the picture is not RGB bytes.
    """
    _check_rgb('image', image, rank=3)
    resized = Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized, np.float32) / np.float32(127.5) - 1


def _check_rgb(name: str, pixels: np.ndarray, rank: int) -> None:
    """Raise InputError unless the array is RGB bytes of that rank with at least one pixel."""
    if pixels.ndim != rank or pixels.shape[-1] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        wanted = '[H, W, 3]' if rank == 3 else '[T, H, W, 3]'
        raise InputError(f'{name}: got {pixels.dtype} {list(pixels.shape)}; give RGB bytes, uint8 {wanted}, not empty.')
