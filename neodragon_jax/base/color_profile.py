"""Color profiles of pictures: phones store Display P3 and printers CMYK, a video has sRGB."""

from __future__ import annotations

import io

from PIL import Image, ImageCms


def to_srgb(image: Image.Image) -> Image.Image:
    """Return a picture in sRGB, RGB or RGBA, as a browser shows it.

    A picture without a profile, or with one that cannot be used, is taken for sRGB.
    """
    alpha = image.convert('RGBA').getchannel('A') if image.has_transparency_data else None
    colors = image if image.mode in ('RGB', 'L', 'CMYK') else image.convert('RGB')
    colors = _converted(colors, image.info.get('icc_profile')).convert('RGB')
    if alpha is not None:
        colors.putalpha(alpha)
    return colors


def _converted(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return a picture after converting it from a profile to sRGB."""
    if not profile:
        return image
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if 'sRGB' in ImageCms.getProfileDescription(given):
            return image
        converted = ImageCms.profileToProfile(image, given, ImageCms.createProfile('sRGB'), outputMode='RGB')
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return image if converted is None else converted
