"""Colors of pictures, by the rules of `neodragon_jax/base/color_profile.py` and `color_tags.py`.

A PNG file may tell its colors in four ways. The first of these counts: cICP, a profile, sRGB, gAMA with cHRM.
Source: W3C, Portable Network Graphics (third edition), section 4.3.
"""

from __future__ import annotations

import io
import pathlib
import struct
from typing import Any

import numpy as np
from PIL import Image, ImageCms

# Values of ITU-T H.273 that are close enough to sRGB; 0, 2 and 3 stand for no value.
PRIMARIES = (0, 2, 3, 1, 5, 6, 7, 22)
TRANSFERS = (0, 2, 3, 1, 4, 6, 7, 11, 12, 13, 14, 15)
GRAY_MODES = ('1', 'L', 'LA')
# Of sRGB: gAMA, and cHRM, which is x and y of white, red, green and blue.
GAMMA, CHROMATICITIES = 1 / 2.2, (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
# Decoders take a gamma within 5% for equal. The chromaticities of BT.601 are within 0.01, those of P3 are not.
GAMMA_TOLERANCE, CHROMATICITY_TOLERANCE = 0.05, 0.0101
# Profiles of sRGB differ by a rounding, 1 or 2 of 255.
SAME_COLORS = 2


def take_tags(image: Image.Image, path: pathlib.Path) -> str | None:
    """Return why a PNG file's tags tell other colors than sRGB; None if they do not.

    Drops the profile if a tag goes before it, so that `to_srgb` does not see it.

    Args:
      image: opened and not loaded.
      path: of its file.
    """
    if image.format != 'PNG':
        return None
    coded = _cicp(path)
    if coded is not None:
        image.info.pop('icc_profile', None)
        primaries, transfer, matrix, full_range = (*coded, 0, 0, 0, 0)[:4]
        usual = primaries in PRIMARIES and transfer in TRANSFERS and matrix == 0 and full_range == 1
        return None if usual else f'cICP {primaries}/{transfer}/{matrix}/{full_range} of ITU-T H.273'
    if 'icc_profile' in image.info or 'srgb' in image.info:
        return None
    gamma, points = image.info.get('gamma', GAMMA), image.info.get('chromaticity', CHROMATICITIES)
    if abs(gamma / GAMMA - 1) > GAMMA_TOLERANCE:
        return f'gAMA {gamma:g}'
    apart = max(abs(point - usual) for point, usual in zip(points, CHROMATICITIES, strict=True))
    if image.mode not in GRAY_MODES and apart > CHROMATICITY_TOLERANCE:
        return f'cHRM {" ".join(f"{point:g}" for point in points)}'
    return None


def to_srgb(image: Image.Image) -> Image.Image:
    """Return a picture in sRGB, RGB or RGBA, as a browser shows it.

    A picture without a profile, or with one that cannot be used, is taken for sRGB.
    """
    alpha = image.convert('RGBA').getchannel('A') if image.has_transparency_data else None
    colors = _converted(image, image.info.get('icc_profile')).convert('RGB')
    if alpha is not None:
        colors.putalpha(alpha)
    return colors


def _cicp(path: pathlib.Path) -> bytes | None:
    """Return the code points in a PNG file, which Pillow does not read; None if it has none."""
    with path.open('rb') as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack('>I4s', head)
            if kind == b'cICP':
                return file.read(min(length, 4))
            if kind == b'IDAT':
                break
            file.seek(length + 4, io.SEEK_CUR)
    return None


def _converted(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return a picture after converting it from a profile to sRGB; unchanged if the profile has sRGB's colors."""
    if not profile:
        return image
    try:
        given: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {'RGB': 'RGB', 'GRAY': 'L', 'CMYK': 'CMYK'}.get(given.profile.xcolor_space.strip())
        fits = {'RGB': image.mode != 'CMYK', 'L': image.mode in GRAY_MODES, 'CMYK': image.mode == 'CMYK'}
        if mode is None or not fits[mode]:
            return image
        transform = ImageCms.buildTransform(given, ImageCms.createProfile('sRGB'), mode, 'RGB')
        if mode != 'CMYK' and _keeps_colors(transform, mode):
            return image
        converted = ImageCms.applyTransform(image.convert(mode), transform)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return image if converted is None else converted


def _keeps_colors(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return whether a transform to sRGB changes no color: the name of a profile does not tell."""
    levels = np.linspace(0, 255, 256 if mode == 'L' else 9).round().astype(np.uint8)
    grid = levels[None] if mode == 'L' else np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    shown = ImageCms.applyTransform(Image.fromarray(grid), transform)
    given = np.asarray(Image.fromarray(grid).convert('RGB'), int)
    return shown is not None and int(np.abs(np.asarray(shown, int) - given).max()) <= SAME_COLORS
