"""Crops that a container asks for: `clap` of QuickTime and mp4, PixelCrop of Matroska. PyAV does not tell them.

Sources: ISO/IEC 14496-12, section 12.1.4; RFC 9559, section 5.1.4.1.28.
"""

from __future__ import annotations

import os
import pathlib
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from neodragon_jax.base.files import naming

Span = tuple[int, int]
# Yields the name and the content's first and last byte + 1 of every part between two places of a file.
Walk = Callable[[BinaryIO, int, int], Iterator[tuple[Any, int, int]]]

_SEGMENT, _TRACKS, _TRACK, _VIDEO = 0x18538067, 0x1654AE6B, 0xAE, 0xE0
_PIXEL_CROPS = (0x54AA, 0x54BB, 0x54CC, 0x54DD)  # bottom, top, left, right
# Bytes of a sample table's description before its entries, and of a video entry before its boxes.
_ENTRIES, _VIDEO_ENTRY = 8, 78


def is_cropped(path: str | os.PathLike[str], container: str, track: int, size: tuple[int, int]) -> bool:
    """Return whether a container shows only a part of its frames. A damaged file is not: the decoder reports it.

    Args:
      container: FFmpeg's name of the format.
      track: the number of the track in an mp4. In Matroska, every video track is looked at.
      size: width and height of the decoded frames.
    """
    kind = container.split(',')[0]
    if kind not in ('mov', 'matroska'):
        return False
    with naming(path), pathlib.Path(path).open('rb') as file:
        whole = 0, os.fstat(file.fileno()).st_size
        return _mp4_crops(file, whole, track, size) if kind == 'mov' else _matroska_crops(file, whole)


def _mp4_crops(file: BinaryIO, whole: Span, track: int, size: tuple[int, int]) -> bool:
    """Return whether a track's clean aperture is smaller than its frames."""
    movie = next(_inside(_boxes, file, whole, [b'moov']), (0, 0))
    for span in _inside(_boxes, file, movie, [b'trak']):
        header = next(_inside(_boxes, file, span, [b'tkhd']), (0, 0))
        table = next(_inside(_boxes, file, span, [b'mdia', b'minf', b'stbl', b'stsd']), None)
        if table is None or _track_number(file, header) != track:
            continue
        for _, start, end in _boxes(file, table[0] + _ENTRIES, table[1]):
            for first, _ in _inside(_boxes, file, (start + _VIDEO_ENTRY, end), [b'clap']):
                sides = _unpack(file, first, '>4I') or (0, 0, 0, 0)
                shown = [above / below if below else 0 for above, below in (sides[:2], sides[2:])]
                if any(part < side - 0.5 for part, side in zip(shown, size, strict=True)):
                    return True
    return False


def _track_number(file: BinaryIO, header: Span) -> int | None:
    """Return the number in a track's header, whose version 1 has longer times before it."""
    version = _unpack(file, header[0], '>B')
    found = _unpack(file, header[0] + (20 if version == (1,) else 12), '>I')
    return found[0] if found else None


def _matroska_crops(file: BinaryIO, whole: Span) -> bool:
    """Return whether a video track's number of cropped pixels is not zero."""
    tracks = next(_inside(_elements, file, whole, [_SEGMENT, _TRACKS]), (0, 0))
    for video in _inside(_elements, file, tracks, [_TRACK, _VIDEO]):
        for name, start, end in _elements(file, *video):
            file.seek(start)
            if name in _PIXEL_CROPS and any(file.read(min(end - start, 8))):
                return True
    return False


def _inside(walk: Walk, file: BinaryIO, span: Span, names: Sequence[Any]) -> Iterator[Span]:
    """Yield the content of all parts with a path of names below a span."""
    if not names:
        yield span
        return
    for name, start, end in walk(file, *span):
        if name == names[0]:
            yield from _inside(walk, file, (start, end), names[1:])


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the boxes of an mp4 in a span; stop at a damaged one."""
    while start + 8 <= end:
        size, name = _unpack(file, start, '>I4s') or (1, b'')
        first = start + 8
        if size == 1:  # a longer size follows
            (size,), first = _unpack(file, first, '>Q') or (0,), first + 8
        elif size == 0:  # up to the end
            size = end - start
        if start + size < first:
            return
        yield name, first, min(start + size, end)
        start += size


def _elements(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the elements of a Matroska file in a span; one of unknown size goes to the end. Stop at a damaged one."""
    while start < end:
        file.seek(start)
        head = file.read(12)
        id_length = _vint_length(head)
        size_length = _vint_length(head[id_length:])
        if not id_length or not size_length or len(head) < id_length + size_length:
            return
        first, most = start + id_length + size_length, (1 << 7 * size_length) - 1
        size = int.from_bytes(head[id_length : id_length + size_length]) & most
        stop = end if size == most else min(first + size, end)
        yield int.from_bytes(head[:id_length]), first, stop
        start = stop


def _vint_length(head: bytes) -> int:
    """Return the bytes of a number whose first byte has one leading zero fewer; 0 if it is damaged."""
    return 9 - head[0].bit_length() if head and head[0] else 0


def _unpack(file: BinaryIO, place: int, layout: str) -> tuple[Any, ...] | None:
    """Return values at a place of a file, or None at its end."""
    file.seek(place)
    content = file.read(struct.calcsize(layout))
    return struct.unpack(layout, content) if len(content) == struct.calcsize(layout) else None
