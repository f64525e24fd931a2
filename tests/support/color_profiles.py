"""Color profiles for tests of pictures."""

from __future__ import annotations

from PIL import ImageCms


def exchanged_profile() -> bytes:
    """Return a color profile whose red is sRGB's blue, and the reverse."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    for old, new in ((b'rXYZ', b'____'), (b'bXYZ', b'rXYZ'), (b'____', b'bXYZ')):
        profile = profile.replace(old, new)
    return profile.replace('sRGB'.encode('utf-16-be'), 'test'.encode('utf-16-be'))
