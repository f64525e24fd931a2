"""Looking into video files of unknown origin, and cutting clips at 24 frames per second out of them.

Legend: N frames of a file, T frames of a clip, H W pixels.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import av
import av.container
import av.error
import av.video.stream
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.video import read_image

FPS = 24
VIDEOS = ('.mp4', '.m4v', '.mov', '.mkv', '.webm', '.avi', '.mpg', '.mpeg', '.ts', '.flv', '.wmv', '.ogv')
PICTURES = ('.png', '.jpg', '.jpeg', '.webp')
# A longer time without a new frame shows as a frozen picture.
LONGEST_GAP_S = 3 / FPS
# Files that do not count their frames tell how long they last, sound included, which may end a little later.
MISSING_S = 0.5


class Unusable(Exception):
    """A file gives no clip; the message says why."""


@dataclasses.dataclass(frozen=True)
class Footage:
    """What a file holds.

    Attributes:
      times: seconds at which each frame is shown, [N], ascending.
      height, width: pixels as displayed: upright, and square.
    """

    times: Float[np.ndarray, ' N']
    height: int
    width: int


def inspect(path: pathlib.Path) -> Footage:
    """Decode a file to its end, and return what it holds.

    Raises:
      Unusable: it is no video or picture, damaged, or cut off.
    """
    if path.suffix.lower() not in VIDEOS + PICTURES:
        raise Unusable(f'neither video nor picture by its name ({path.suffix or "no suffix"})')
    if path.stat().st_size == 0:
        raise Unusable('empty file')
    if path.suffix.lower() in PICTURES:
        height, width = _picture(path).shape[:2]
        return Footage(np.zeros(1), height, width)
    try:
        return _inspect_video(path)
    except (av.error.FFmpegError, OSError) as error:
        raise Unusable(f'damaged, or not a video ({error.strerror})') from None


def _inspect_video(path: pathlib.Path) -> Footage:
    with av.open(str(path)) as container:
        stream = _video_stream(container)
        times: list[float] = []
        sizes = set()
        for frame in stream.decode_all():
            if frame.time is None:
                raise Unusable('frames do not tell their times')
            if frame.is_corrupt:
                raise Unusable(f'frame {len(times)} is damaged')
            times.append(frame.time)
            sizes.add(displayed_size(frame, stream.pixel_aspect))
        _check_complete(times, stream, container)
    if len(sizes) > 1:
        raise Unusable(f'changes its size: {", ".join(f"{height}x{width}" for height, width in sorted(sizes))}')
    if (np.diff(times) <= 0).any():
        raise Unusable('times of frames do not ascend')
    return Footage(np.array(times), *sizes.pop())


@dataclasses.dataclass(frozen=True)
class _Stream:
    """The video stream of an open file."""

    container: av.container.InputContainer
    stream: av.video.stream.VideoStream

    @property
    def pixel_aspect(self) -> float:
        """Width of a stored pixel over its height."""
        return float(self.stream.sample_aspect_ratio or 1)

    def decode_all(self) -> Iterator[av.VideoFrame]:
        """Yield all frames in the order in which they are shown; damage raises FFmpegError."""
        return self.container.decode(self.stream)


def _video_stream(container: av.container.InputContainer) -> _Stream:
    """Return the video stream of a file, set to report damage where FFmpeg would paint over it."""
    if not container.streams.video:
        raise Unusable('no video in it')
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise Unusable('its codec is unknown here')
    stream.codec_context.options = {'err_detect': 'explode'}
    stream.codec_context.thread_count = 1  # many files are read side by side
    return _Stream(container, stream)


def _check_complete(times: Sequence[float], stream: _Stream, container: av.container.InputContainer) -> None:
    """Raise Unusable if a file holds less than it says: FFmpeg takes a truncated file for a short one."""
    if not times:
        raise Unusable('no frames in it')
    declared, interval = stream.stream.frames, _interval(times)
    shown = times[-1] - times[0] + interval
    if declared:
        length = float((stream.stream.duration or 0) * (stream.stream.time_base or 0))
        # An edit list may hide frames; the duration leaves them out, too.
        if len(times) < declared and length - shown > interval / 2:
            raise Unusable(f'truncated: declares {declared} frames, holds {len(times)}')
    elif container.duration is not None and container.duration / av.time_base - shown > MISSING_S:
        raise Unusable(f'truncated: declares {container.duration / av.time_base:.1f} s, holds {shown:.1f} s')


def _interval(times: Sequence[float] | np.ndarray) -> float:
    """Return the mean seconds from frame to frame; 0 of a single one."""
    return float(times[-1] - times[0]) / max(len(times) - 1, 1)


def displayed_size(frame: av.VideoFrame, pixel_aspect: float) -> tuple[int, int]:
    """Return height and width of a frame as displayed."""
    height, width = frame.height, round(frame.width * pixel_aspect)
    return (width, height) if frame.rotation % 180 else (height, width)


def ticks(times: Float[np.ndarray, ' N'], fps: int = FPS) -> Int[np.ndarray, ' M']:
    """Return, for every 1/fps seconds from the first frame to the end of the last, the index of the nearest frame.

    The nearest in time, whatever the rate of the file, and whether that is constant or not.
    """
    length = times[-1] - times[0] + _interval(times) / 2
    # Times in some files are rounded to milliseconds.
    moments = times[0] + np.arange(int((length + 5e-4) * fps) + 1) / fps
    return np.searchsorted((times[1:] + times[:-1]) / 2, moments - 1e-6)


def cut(footage: Footage, frames: int, clips: int, min_fps: float) -> list[Int[np.ndarray, ' T']]:
    """Return the indices of the frames of up to `clips` clips, evenly spread over a file, without overlap.

    Raises:
      Unusable: the file is too short or has too few frames per second.
    """
    times = footage.times
    if frames == 1:
        grid = np.arange(len(times))
    elif len(times) == 1:
        raise Unusable(f'a single picture; clips have {frames} frames')
    else:
        if (rate := 1 / float(np.median(np.diff(times)))) < min_fps - 1e-3:
            raise Unusable(f'{rate:.4g} frames per second, fewer than {min_fps:g}')
        gap = int(np.argmax(np.diff(times)))
        if times[gap + 1] - times[gap] > LONGEST_GAP_S:
            raise Unusable(f'no frame from {times[gap]:.2f} s to {times[gap + 1]:.2f} s')
        grid = ticks(times)
    count = min(clips, len(grid) // frames)
    if not count:
        raise Unusable(f'too short: {len(grid)} frames at {FPS} per second, {frames} needed')
    free = len(grid) - count * frames
    starts = [number * frames + round(free * (number + 1) / (count + 1)) for number in range(count)]
    return [grid[start : start + frames] for start in starts]


def choose_size(footage: Footage, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the size that keeps most of the picture without enlarging it; of equal ones the largest.

    Args:
      sizes: (height, width) to choose from.
    Raises:
      Unusable: it is smaller than all of them.
    """
    height, width = footage.height, footage.width
    fitting = [size for size in sizes if size[0] <= height and size[1] <= width]
    if not fitting:
        raise Unusable(f'{height}x{width} pixels, smaller than {" and ".join(f"{h}x{w}" for h, w in sizes)}')

    def kept(size: tuple[int, int]) -> float:
        ratio = size[1] / size[0] * height / width
        return round(min(ratio, 1 / ratio), 6)

    return max(fitting, key=lambda size: (kept(size), size[0] * size[1]))


def read_clips(
    path: pathlib.Path, clips: Sequence[Sequence[int]], size: tuple[int, int]
) -> list[UInt8[np.ndarray, 'T H W 3']]:
    """Return clips of a file, given by the indices of their frames, cropped and resized.

    Raises:
      Unusable: the file is not what it was when it was inspected.
    """
    wanted = {index for clip in clips for index in clip}
    if path.suffix.lower() in PICTURES:
        found = {0: fit(_picture(path), size)}
    else:
        try:
            with av.open(str(path)) as container:
                found = _decode_wanted(_video_stream(container), wanted, size)
        except (av.error.FFmpegError, OSError) as error:
            raise Unusable(f'damaged, or not a video ({error.strerror})') from None
    if wanted - found.keys():
        raise Unusable(f'has fewer than {max(wanted) + 1} frames')
    return [np.stack([found[index] for index in clip]) for clip in clips]


def _decode_wanted(stream: _Stream, wanted: set[int], size: tuple[int, int]) -> dict[int, UInt8[np.ndarray, 'H W 3']]:
    """Return some frames by index. All before them are decoded, too: where one may start is the codec's secret."""
    found, last = {}, max(wanted)
    for index, frame in enumerate(stream.decode_all()):
        if index in wanted:
            pixels = frame.to_ndarray(format='rgb24')
            upright = np.rot90(pixels, frame.rotation // 90)
            aspect = stream.pixel_aspect
            found[index] = fit(upright, size, 1 / aspect if frame.rotation % 180 else aspect)
        if index == last:
            break
    return found


def fit(
    pixels: UInt8[np.ndarray, 'h w 3'], size: tuple[int, int], pixel_aspect: float = 1
) -> UInt8[np.ndarray, 'H W 3']:
    """Cut the largest part of the size's proportions out of the middle, and resize it with a Lanczos filter.

    Args:
      size: (H, W).
      pixel_aspect: width of a pixel over its height.
    """
    (height, width), (rows, columns) = size, pixels.shape[:2]
    # The part, in stored pixels.
    part_rows = min(rows, columns * pixel_aspect * height / width)
    part_columns = min(columns, rows * width / height / pixel_aspect)
    top, left = (rows - part_rows) / 2, (columns - part_columns) / 2
    box = (left, top, left + part_columns, top + part_rows)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))


def _picture(path: pathlib.Path) -> UInt8[np.ndarray, 'H W 3']:
    try:
        return read_image(path)
    except InputError:
        raise Unusable('damaged, or not a picture of 8 bits per color') from None
