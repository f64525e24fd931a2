"""Color tags and color profiles of PNG files for tests of pictures."""

from __future__ import annotations

import struct
import zlib

from PIL import ImageCms

# Chunks before the pixels -> whether they tell sRGB, or the nearly equal colors of SDR video.
TAGS = {
    'sRGB': ({b'cICP': bytes([1, 13, 0, 1])}, True),
    'BT.709': ({b'cICP': bytes([1, 1, 0, 1])}, True),
    'PQ': ({b'cICP': bytes([9, 16, 0, 1])}, False),
    'HLG': ({b'cICP': bytes([9, 18, 0, 1])}, False),
    'Display P3': ({b'cICP': bytes([12, 13, 0, 1])}, False),
    'linear': ({b'cICP': bytes([1, 8, 0, 1])}, False),
    'narrow range': ({b'cICP': bytes([1, 13, 0, 0])}, False),
    'cut': ({b'cICP': bytes([1, 13])}, False),
    'cICP before sRGB': ({b'sRGB': b'\0', b'cICP': bytes([12, 13, 0, 1])}, False),
    'gamma 2.2': ({b'gAMA': struct.pack('>I', 45455)}, True),
    'gamma 1.8': ({b'gAMA': struct.pack('>I', 55555)}, False),
    'gamma 1': ({b'gAMA': struct.pack('>I', 100000)}, False),
    'no gamma': ({b'gAMA': struct.pack('>I', 0)}, False),
    'sRGB before gamma': ({b'gAMA': struct.pack('>I', 100000), b'sRGB': b'\0'}, True),
    'primaries': ({b'cHRM': struct.pack('>8I', 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)}, True),
    'P3': ({b'cHRM': struct.pack('>8I', 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)}, False),
}


def with_chunks(content: bytes, chunks: dict[bytes, bytes]) -> bytes:
    """Return a PNG file with more chunks after its header."""
    size = len(b'\x89PNG\r\n\x1a\n') + 25
    packed = (
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )
    return content[:size] + b''.join(packed) + content[size:]


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
