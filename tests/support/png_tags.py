"""Color tags of PNG files for tests of pictures."""

from __future__ import annotations

import struct
import zlib

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
