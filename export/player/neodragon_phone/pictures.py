"""Picture files as frames, by the rules of `neodragon_jax/base/video.py`.

Legend: H W pixels of the video, h w pixels of the file.
"""

from __future__ import annotations

import pathlib

import numpy as np
from PIL import Image, ImageOps

from neodragon_phone.colors import take_tags, to_srgb
from neodragon_phone.errors import BundleError

# Larger pictures are refused before decoding: decoded, they may be a thousand times larger than their file.
MAX_PIXELS = 2**26
BACKGROUND = 'white'  # under transparent pictures
# Without those that may hold HDR, whose transfer curve Pillow ignores.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM')


def read_frame(path: pathlib.Path, height: int, width: int) -> np.ndarray:
    """Return a picture file as a frame [H, W, 3] in [-1, 1], cropped at the center.

    Raises:
      BundleError: see `read_picture`.
    """
    return to_frame(crop_center(read_picture(path), height, width), height, width)


def read_picture(path: pathlib.Path) -> np.ndarray:
    """Return a picture file as sRGB bytes [h, w, 3], upright by its orientation tag; transparent areas become white.

    Raises:
      BundleError: the file cannot be read, has more than 8 bits per color, more than MAX_PIXELS pixels, or tags of
        other colors than sRGB; profiles are converted.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BundleError(
                    f'{path} has {image.width}x{image.height} pixels, more than {MAX_PIXELS}; save it smaller.'
                )
            if image.mode.startswith(('I', 'F')):
                raise BundleError(f'{path} has more than 8 bits per color (mode {image.mode}); save it as 8-bit RGB.')
            if other := take_tags(image, path):
                raise BundleError(f'{path} has other colors than sRGB ({other}); convert it to sRGB.')
            upright = to_srgb(ImageOps.exif_transpose(image))
            if upright.mode == 'RGBA':
                upright = Image.alpha_composite(Image.new('RGBA', upright.size, BACKGROUND), upright)
            return np.array(upright.convert('RGB'))
    except Image.DecompressionBombError:
        raise BundleError(f'{path} has more than {MAX_PIXELS} pixels; save it smaller.') from None
    except (OSError, ValueError, SyntaxError) as error:  # a damaged PNG or TIFF is a ValueError or SyntaxError
        reason = getattr(error, 'strerror', None) or 'not a picture, or damaged'
        raise BundleError(f'{path} cannot be read as a picture ({reason}); give a PNG or JPEG file.') from None


def crop_center(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the largest centered part of a picture with the shape of height x width."""
    rows, columns, _ = picture.shape
    tall = min(rows, max(1, round(columns * height / width)))
    wide = min(columns, max(1, round(rows * width / height)))
    top, left = (rows - tall) // 2, (columns - wide) // 2
    return picture[top : top + tall, left : left + wide]


def to_frame(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return RGB bytes, resized with a Lanczos filter, as a frame [H, W, 3] in [-1, 1]."""
    resized = Image.fromarray(np.ascontiguousarray(picture)).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized, np.float32) / np.float32(127.5) - 1
