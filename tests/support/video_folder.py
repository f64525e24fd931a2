"""Videos of numbered frames, and a folder of good and bad video files with a table of captions."""

from __future__ import annotations

import csv
import fractions
import pathlib
import unicodedata

import av
import numpy as np
from PIL import Image

FRAMES = 9
CLOCK = fractions.Fraction(1, 600)  # seconds
BARS = 8


def numbered(index: int, size: tuple[int, int]) -> np.ndarray:
    """Return a picture of vertical bars that encode a number below 256 in binary."""
    bits = index >> np.arange(BARS) & 1
    row = np.repeat(np.where(bits, 200, 50), -(-size[1] // BARS))[: size[1]]
    return np.broadcast_to(row[None, :, None], (*size, 3)).astype(np.uint8)


def number_of(frame: np.ndarray) -> int:
    """Return the number in a picture of `numbered` after compression and resizing, if no column is cut off."""
    bars = frame.mean(axis=(0, 2)).reshape(BARS, -1).mean(axis=1)
    return int((bars > 125) @ (1 << np.arange(BARS)))


def movie(path: pathlib.Path, times=None, size=(128, 160), codec='libx264', picture=None, **options) -> pathlib.Path:
    """Write a video whose frames show their numbers, or all one picture."""
    times = np.arange(30) / 24 if times is None else times
    with av.open(str(path), 'w', options={'movflags': '+faststart'} if path.suffix == '.mp4' else {}) as container:
        stream = container.add_stream(codec, rate=24, options={'crf': '8', 'g': '12'} if codec == 'libx264' else {})
        stream.height, stream.width, stream.pix_fmt = *size, 'yuv420p'
        stream.codec_context.time_base = CLOCK
        for name, value in options.items():
            setattr(stream.codec_context, name, value)
        for number, time_s in enumerate(times):
            pixels = numbered(number, size) if picture is None else picture
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format='rgb24')
            frame.pts, frame.time_base = round(time_s / CLOCK), CLOCK
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def textured(path: pathlib.Path) -> pathlib.Path:
    """Write a video with enough bytes per frame to damage."""
    noise = np.random.default_rng(0).integers(0, 255, (128, 160, 3), np.uint8)
    return movie(path, picture=noise)


def audio_only(path: pathlib.Path) -> None:
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('aac', rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono')
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def turned(path: pathlib.Path, source: pathlib.Path) -> None:
    """Copy an mp4 with a display matrix that rotates it clockwise."""
    words = lambda *values: b''.join((value % 2**32).to_bytes(4, 'big') for value in values)
    one, last = 1 << 16, 1 << 30
    content = source.read_bytes()
    place = content.index(words(one, 0, 0, 0, one, 0, 0, 0, last), content.index(b'tkhd'))
    matrix = words(0, one, 0, -one, 0, 0, 0, 0, last)
    path.write_bytes(content[:place] + matrix + content[place + len(matrix) :])


GOOD = {
    'wide.mp4': 'a dragon née №1 🐉, \u2068שלום\u2069',
    'tall.mp4': 'second line',
    'de\u0301ja\u0300 vu.mkv': 'decomposed name',  # the table names it in composed form
    'sub/deep.webm': 'of another codec',
    'variable.mov': 'uneven times',
}
BAD = {
    'truncated.mp4': r'damaged, or not a video',
    'cut_between_frames.mp4': r'truncated: declares 30 frames, holds 20',
    'cut.mkv': r'truncated: declares 1.2 s, holds 0.\d s',
    'no_index.mp4': r'no video in it',
    'flipped.mp4': r'damaged, or not a video',
    'zero.mp4': r'empty file',
    'codec.mp4': r'its codec is unknown here',
    'sound.mp4': r'no video in it',
    'short.mp4': r'too short: 5 frames at 24 per second, 9 needed',
    'slow.mp4': r'12 frames per second, fewer than 23',
    'frozen.mp4': r'no frame from 0.46 s to 0.75 s',
    'small.mp4': r'48x64 pixels, smaller than 64x128 and 128x64',
    'text.mp4': r'damaged, or not a video',
    'still.png': r'a single picture; clips have 9 frames',
    'renamed.mp4': r'a single picture; clips have 9 frames',
    'notes.pdf': r'neither video nor picture by its name \(\.pdf\)',
    'uncaptioned.mp4': r'no caption',
    'empty_caption.mp4': r'caption is empty',
    'latin1.mp4': r'caption is not valid Unicode',
    'lost.mp4': r'caption has lost characters',
    'absent.mp4': r'has a caption, but is not there',
}


def make_folder(folder: pathlib.Path) -> None:
    """Write the files of GOOD and BAD, and captions.csv."""
    (folder / 'sub').mkdir(parents=True)
    movie(folder / 'wide.mp4')
    movie(folder / 'tall.mp4', size=(160, 96))
    movie(folder / 'de\u0301ja\u0300 vu.mkv')
    movie(folder / 'sub' / 'deep.webm', codec='libvpx-vp9')
    rng = np.random.default_rng(0)
    movie(folder / 'variable.mov', np.cumsum(rng.integers(9, 30, 50)) / 600)
    content = textured(folder / 'whole.mp4').read_bytes()
    (folder / 'truncated.mp4').write_bytes(content[: len(content) * 2 // 3])
    with av.open(str(folder / 'whole.mp4')) as container:
        packets = list(container.demux(video=0))
    (folder / 'cut_between_frames.mp4').write_bytes(content[: packets[20].pos])
    (folder / 'flipped.mp4').write_bytes(content[:50_000] + bytes(2000) + content[52_000:])
    (folder / 'codec.mp4').write_bytes(content.replace(b'avc1', b'zzzz'))
    whole = (folder / 'whole.mp4').rename(folder / 'uncaptioned.mp4')
    # An mp4 without its index cannot be read.
    moved = content.index(b'mdat') - 4
    (folder / 'no_index.mp4').write_bytes(content[:40] + content[moved:])
    matroska = textured(folder / 'cut.mkv')
    matroska.write_bytes(matroska.read_bytes()[: matroska.stat().st_size // 2])
    (folder / 'zero.mp4').touch()
    audio_only(folder / 'sound.mp4')
    movie(folder / 'short.mp4', np.arange(5) / 24)
    movie(folder / 'slow.mp4', np.arange(20) / 12)
    movie(folder / 'frozen.mp4', np.delete(np.arange(40) / 24, slice(12, 18)))
    movie(folder / 'small.mp4', size=(48, 64))
    (folder / 'text.mp4').write_text('not a video\n' * 100)
    Image.new('RGB', (200, 200)).save(folder / 'still.png')
    (folder / 'renamed.mp4').write_bytes((folder / 'still.png').read_bytes())
    (folder / 'notes.pdf').write_bytes(b'%PDF')
    for name in ('empty_caption', 'latin1', 'lost'):
        (folder / f'{name}.mp4').write_bytes(whole.read_bytes())
    captions = {unicodedata.normalize('NFC', name): text for name, text in GOOD.items()}
    captions['tall.mp4'] = 'second\r\n\tline\x0b'
    captions |= {name: 'any' for name in BAD if name not in ('uncaptioned.mp4',)}
    captions |= {'empty_caption.mp4': ' \ufeff\u200b\n', 'lost.mp4': 'caf\ufffd'}
    with (folder / 'captions.csv').open('w', encoding='utf-8-sig', newline='') as file:
        table = csv.writer(file)
        table.writerow(['file', 'caption'])
        table.writerows(captions.items())
    table = (folder / 'captions.csv').read_bytes()
    (folder / 'captions.csv').write_bytes(table.replace(b'latin1.mp4,any', b'latin1.mp4,caf\xe9'))


def arguments(folder, out, *more: str) -> list[str]:
    given = ['--videos', str(folder), '--out', str(out), '--frames', str(FRAMES), '--sizes', '64x128', '128x64']
    return [*given, '--workers', '2', '--samples-per-shard', '2', *more]


def with_table(folder, out) -> list[str]:
    return arguments(folder, out, '--captions', str(folder / 'captions.csv'))


def report_of(out: pathlib.Path) -> dict[str, dict[str, str]]:
    with (out / 'report.tsv').open(encoding='utf-8', newline='') as file:
        return {row['file']: row for row in csv.DictReader(file, delimiter='\t')}
