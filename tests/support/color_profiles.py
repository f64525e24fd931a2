"""Color profiles for tests of pictures."""

from __future__ import annotations

import struct

from PIL import ImageCms


def exchanged_profile() -> bytes:
    """Return a color profile whose red is sRGB's blue, and the reverse."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    for old, new in ((b'rXYZ', b'____'), (b'bXYZ', b'rXYZ'), (b'____', b'bXYZ')):
        profile = profile.replace(old, new)
    return profile.replace('sRGB'.encode('utf-16-be'), 'test'.encode('utf-16-be'))


def linear_profile(description: str) -> bytes:
    """Return a color profile of sRGB's primaries with linear curves, under any name."""
    base = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    (count,) = struct.unpack('>I', base[128:132])
    entries = [struct.unpack('>4sII', base[132 + 12 * index : 144 + 12 * index]) for index in range(count)]
    tags = {name: base[start : start + size] for name, start, size in entries}
    tags |= dict.fromkeys((b'rTRC', b'gTRC', b'bTRC'), b'curv' + bytes(4) + struct.pack('>IH', 1, 256) + bytes(2))
    text = description.encode('utf-16-be')
    tags[b'desc'] = b'mluc' + bytes(4) + struct.pack('>II2s2sII', 1, 12, b'en', b'US', len(text), 28) + text
    table, body, start = b'', b'', 132 + 12 * count
    for name, data in tags.items():
        table += struct.pack('>4sII', name, start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    content = base[:128] + struct.pack('>I', count) + table + body
    return struct.pack('>I', len(content)) + content[4:]
