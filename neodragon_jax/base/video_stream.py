"""Frames of video files of unknown origin, as a player shows them; files that cannot be shown correctly are rejected.

Handled: rotation and mirroring, edit lists, uneven frame times, untagged colors, cover pictures, several tracks.
Rejected, with a reason: damage, truncation, colors that are not those of BT.709 or BT.601, interlacing, transparency,
skewed display matrices, crops by the container.

Legend: H W pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import av
import av.container
import av.error
import av.stream
import av.video.stream
import numpy as np
from jaxtyping import UInt8

from neodragon_jax.base.color_tags import UNTAGGED, color_problem
from neodragon_jax.base.container_crop import is_cropped
from neodragon_jax.base.files import naming

# Largest number of pixels of a frame, checked before decoding: 8K video has 33 million.
MOST_PIXELS = 2**25
# Containers round times to milliseconds, and tracks of one file end at slightly different times.
ROUNDING_S, TRACKS_S = 2e-3, 0.5
# Players take untagged video of at least this size for BT.709, and smaller video for BT.601.
HD_HEIGHT, HD_WIDTH = 720, 1280

Signs = tuple[int, int, int, int]


class Unusable(Exception):
    """Error for a file that cannot be shown correctly; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class ShownFrame:
    """A frame and its presentation: time, pixel aspect and orientation.

    Attributes:
      time_s: seconds on the track's own timeline.
      pixel_aspect: width of a stored pixel over its height.
      signs: a, b, c, d of the display matrix, each -1, 0 or 1; see `_signs`.
    """

    frame: av.VideoFrame
    time_s: float
    pixel_aspect: float
    signs: Signs

    @property
    def transposed(self) -> bool:
        """Whether rows are shown as columns."""
        return self.signs[0] == 0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as shown, in square pixels."""
        height, width = self.frame.height, round(self.frame.width * self.pixel_aspect)
        return (width, height) if self.transposed else (height, width)

    @property
    def shown_aspect(self) -> float:
        """Width of a pixel of `pixels` over its height."""
        return 1 / self.pixel_aspect if self.transposed else self.pixel_aspect

    def pixels(self) -> UInt8[np.ndarray, 'H W 3']:
        """Return the stored pixels as RGB, upright and not mirrored."""
        frame, hd = self.frame, self.frame.height >= HD_HEIGHT or self.frame.width >= HD_WIDTH
        untagged = frame.colorspace in UNTAGGED and not frame.format.is_rgb
        stored = frame.reformat(format='rgb24', src_colorspace='ITU709' if untagged and hd else None).to_ndarray()
        a, b, c, d = self.signs
        if self.transposed:
            return stored.swapaxes(0, 1)[::b, ::c]
        return stored[::d, ::a]


class _Bytes:
    """The bytes of a file, as PyAV reads them.

    FFmpeg takes an error of the system for the end of the file, or for damage.

    Attributes:
      name: of the file.
      error: the error of the system after which nothing more is read; None if there was none.
    """

    def __init__(self, file: BinaryIO) -> None:
        """Begin at the first byte of a file without buffer."""
        self.name, self.error = file.name, None
        self._file, self._place, self._size = file, 0, os.fstat(file.fileno()).st_size

    def read(self, count: int) -> bytes:
        """Return up to `count` bytes, none at the end."""
        if self.error is not None or self._place >= self._size:
            return b''
        try:
            with naming(self.name):
                self._file.seek(self._place)
                content = self._file.read(count)
        except OSError as error:
            self.error = error
            return b''
        self._place += len(content)
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place, which may lie behind the end; return it."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def tell(self) -> int:
        """Return the place."""
        return self._place


class VideoStream:
    """The video track of an open file."""

    def __init__(self, container: av.container.InputContainer, path: str | os.PathLike[str]) -> None:
        """Choose the track that players show, and make the decoder report damage.

        Args:
          path: of the container.
        Raises:
          Unusable: there is no such track, its frames are too large, or only a part of them is shown.
        """
        self._container, self._track = container, _shown_track(container.streams.video)
        context = self._track.codec_context
        if context is None:
            raise Unusable('its codec is unknown here')
        if context.width * context.height > MOST_PIXELS:
            raise Unusable(f'{context.width}x{context.height} pixels, more than {MOST_PIXELS}')
        if self._track.metadata.get('alpha_mode') == '1':
            raise Unusable('has transparency')
        if is_cropped(path, container.format.name, self._track.id, (context.width, context.height)):
            raise Unusable('cropped by its container; crop its frames instead')
        context.options = {'err_detect': 'explode'}  # otherwise FFmpeg conceals damage
        context.thread_count = 1  # many files are read in parallel

    @property
    def _pixel_aspect(self) -> float:
        return float(self._track.sample_aspect_ratio or 1)

    def frames(self) -> Iterator[ShownFrame]:
        """Yield all frames in the order in which they are shown; at the end, check that the file is whole.

        Raises:
          Unusable: a frame cannot be shown correctly, or the file holds less than it declares.
          FFmpegError: the file is damaged.
        """
        times: list[float] = []
        other_end = 0.0
        last: Any = None
        for packet in self._container.demux():
            if packet.stream is not self._track:
                other_end = max(other_end, _end_of(packet))
                continue
            for last in packet.decode():
                shown = self._shown(last, len(times))
                times.append(shown.time_s)
                yield shown
        if last is None:
            raise Unusable('no frames in it')
        held = float(last.duration * last.time_base) if last.duration and last.time_base else 0.0
        self._check_complete(times, held, other_end)

    def _shown(self, frame: av.VideoFrame, number: int) -> ShownFrame:
        if frame.time is None:
            raise Unusable('frames do not tell their times')
        if frame.is_corrupt:
            raise Unusable(f'frame {number} is damaged')
        if frame.interlaced_frame:
            raise Unusable('interlaced; deinterlace it first')
        matrix = None if frame.format.is_rgb else frame.colorspace
        if problem := color_problem(frame.color_primaries, frame.color_trc, matrix):
            raise Unusable(problem)
        if any(component.is_alpha for component in frame.format.components):
            raise Unusable('has transparency')
        return ShownFrame(frame, frame.time, self._pixel_aspect, _signs(frame))

    def _check_complete(self, times: Sequence[float], held: float, other_end: float) -> None:
        """Raise Unusable if the track ends before its declared end: FFmpeg takes a truncated file for a short one.

        Args:
          held: seconds for which the last frame is shown, if the file declares them.
          other_end: end of the other tracks, in seconds.
        """
        track, interval = self._track, mean_interval(times)
        end = times[-1] + max(interval, held)
        if track.frames and len(times) >= track.frames:
            return
        tolerance = interval / 2 + ROUNDING_S
        tag = _seconds(track.metadata.get('DURATION', ''))
        if track.duration and track.time_base:  # excludes the parts that an edit list hides
            declared, shown = float(track.duration * track.time_base), end - times[0]
        elif tag:
            declared, shown = tag, end
        elif self._container.duration:
            declared, shown = self._container.duration / av.time_base, max(end - times[0], end, other_end)
            tolerance = TRACKS_S
        else:
            return
        if declared - shown > tolerance:
            counted = f'{track.frames} frames, holds {len(times)}' if track.frames else ''
            raise Unusable(f'truncated: declares {counted or f"{declared:.1f} s, holds {shown:.1f} s"}')


def open_container(file: object) -> av.container.InputContainer:
    """Open a video for reading, of an open file; text in it, such as its title, may be in any encoding."""
    return av.open(file, mode='r', metadata_errors='replace')


@contextlib.contextmanager
def open_video(path: str | os.PathLike[str]) -> Iterator[VideoStream]:
    """Open a file of any name; damage found inside the block also raises Unusable.

    Raises:
      Unusable: it is no video, damaged, or cannot be shown correctly.
      OSError: the system cannot read the file, which may be good; it names the file.
    """
    with open(path, 'rb', buffering=0) as file:
        content = _Bytes(file)
        try:
            with open_container(content) as container:
                yield VideoStream(container, path)
        except av.error.FFmpegError as error:
            if content.error is None:
                raise Unusable(f'damaged, or not a video ({error.strerror})') from None
        except Unusable:
            if content.error is None:
                raise
        if content.error is not None:
            raise content.error


def _shown_track(tracks: Sequence[av.video.stream.VideoStream]) -> av.video.stream.VideoStream:
    """Return the first track that is the default one, otherwise the first; a cover picture is neither.

    Raises:
      Unusable: there is none.
    """
    flags = av.stream.Disposition
    videos = [track for track in tracks if not track.disposition & flags.attached_pic]
    if not videos:
        raise Unusable('no video in it')
    return max(videos, key=lambda track: bool(track.disposition & flags.default))


def mean_interval(times: Sequence[float] | np.ndarray) -> float:
    """Return the mean seconds between frames; 0 for a single frame."""
    return float(times[-1] - times[0]) / max(len(times) - 1, 1)


def _end_of(packet: av.Packet) -> float:
    """Return the seconds at which a packet's sound or picture ends; 0 if unknown."""
    if packet.pts is None or packet.time_base is None:
        return 0.0
    return float((packet.pts + (packet.duration or 0)) * packet.time_base)


def _seconds(text: str) -> float | None:
    """Return the seconds of a Matroska tag such as 00:00:02.500000000."""
    found = re.fullmatch(r'(\d+):(\d\d):(\d\d(?:\.\d+)?)', text)
    return 3600 * int(found[1]) + 60 * int(found[2]) + float(found[3]) if found else None


def _signs(frame: av.VideoFrame) -> Signs:
    """Return a, b, c, d of the display matrix: column x and row y are shown at column a x + c y, row b x + d y.

    Raises:
      Unusable: the matrix does more than rotate by right angles, mirror and scale.
    """
    sides: Any = frame.side_data
    matrix = sides.get('DISPLAYMATRIX')
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = struct.unpack('=9i', bytes(matrix)[:36])
    straight, crossed = abs(a) == abs(d) != 0 and b == c == 0, abs(b) == abs(c) != 0 and a == d == 0
    if not straight and not crossed:
        raise Unusable('shown askew by its display matrix')
    a, b, c, d = (int(np.sign(value)) for value in (a, b, c, d))
    return a, b, c, d
