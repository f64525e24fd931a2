"""Inspecting video files of unknown origin, and cutting clips at 24 frames per second out of them.

Legend: N frames of a file, T frames of a clip, H W pixels.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.video import decode_image
from neodragon_jax.base.video_stream import Unusable, VideoStream, mean_interval, open_video

FPS = 24
# Names of files that all programs take for videos and for pictures.
VIDEOS = (
    *('.mp4', '.m4v', '.mov', '.3gp', '.mkv', '.webm', '.avi', '.mpg', '.mpeg'),
    *('.ts', '.mts', '.m2ts', '.flv', '.wmv', '.ogv'),
)
PICTURES = ('.png', '.jpg', '.jpeg', '.webp')
# A longer time without a new frame shows as a frozen picture.
LONGEST_GAP_S = 3 / FPS


@dataclasses.dataclass(frozen=True)
class Footage:
    """The times and the size of a file's frames.

    Attributes:
      times: seconds at which each frame is shown, [N], ascending.
      height, width: pixels as displayed: upright, and square.
    """

    times: Float[np.ndarray, ' N']
    height: int
    width: int


def inspect(path: pathlib.Path) -> Footage:
    """Decode a file to its end, and return its times and size.

    Raises:
      Unusable: it is no video or picture, damaged, truncated, or cannot be displayed correctly.
      OSError: the system cannot read the file, which may be good.
    """
    if path.suffix.lower() not in VIDEOS + PICTURES:
        raise Unusable(f'neither video nor picture by its name ({path.suffix or "no suffix"})')
    if path.stat().st_size == 0:
        raise Unusable('empty file')
    if path.suffix.lower() in PICTURES:
        height, width = _picture(path).shape[:2]
        return Footage(np.zeros(1), height, width)
    with open_video(path) as stream:
        times, sizes = [], set()
        for frame in stream.frames():
            if not times:
                frame.pixels()  # raises here, and not when clips are cut, if FFmpeg cannot convert the colors
            times.append(frame.time_s)
            sizes.add(frame.size)
    if len(sizes) > 1:
        raise Unusable(f'changes its size: {", ".join(f"{height}x{width}" for height, width in sorted(sizes))}')
    if (np.diff(times) <= 0).any():
        raise Unusable('times of frames do not ascend')
    return Footage(np.array(times), *sizes.pop())


def ticks(times: Float[np.ndarray, ' N'], fps: int = FPS) -> Int[np.ndarray, ' M']:
    """Return, for every 1/fps seconds from the first frame to the end of the last, the index of the nearest frame.

    Nearest means nearest in time; the file may have any frame rate, constant or variable.
    """
    length = times[-1] - times[0] + mean_interval(times) / 2
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
        if (rate := _rate(times)) < min_fps - 1e-3:
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


def _rate(times: Float[np.ndarray, ' N']) -> float:
    """Return the usual frames per second, of single frames or of groups: phones alternate short and long ones."""
    spans = (1, min(FPS // 4, len(times) - 1))
    return max(span / float(np.median(times[span:] - times[:-span])) for span in spans)


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
    """Return the cropped and resized clips of a file, each selected by its frame indices.

    Raises:
      Unusable: the file has changed since its inspection.
      OSError: the system cannot read the file, which may be good.
    """
    wanted = {index for clip in clips for index in clip}
    if path.suffix.lower() in PICTURES:
        found = {0: fit(_picture(path), size)}
    else:
        with open_video(path) as stream:
            found = _decode_wanted(stream, wanted, size)
    if wanted - found.keys():
        raise Unusable(f'has fewer than {max(wanted) + 1} frames')
    return [np.stack([found[index] for index in clip]) for clip in clips]


def _decode_wanted(
    stream: VideoStream, wanted: set[int], size: tuple[int, int]
) -> dict[int, UInt8[np.ndarray, 'H W 3']]:
    """Return some frames by index. All earlier frames are decoded: not every frame is a seek point."""
    found, last = {}, max(wanted)
    for index, frame in enumerate(stream.frames()):
        if index in wanted:
            found[index] = fit(frame.pixels(), size, frame.shown_aspect)
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
        return decode_image(path)
    except InputError as problem:
        # Without the path: the report prints it beside the reason.
        raise Unusable(str(problem).removeprefix(f'{path} ').split('; ')[0].rstrip('.')) from None
