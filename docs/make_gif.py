"""Write the animated contact sheet of the README: videos side by side, captions below.

python -m neodragon_jax --prompts-file docs/pictures/prompts.txt --out out/pictures
python docs/make_gif.py --videos out/pictures --out docs/pictures/moving_shapes.gif
"""

from __future__ import annotations

import argparse
import pathlib
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from neodragon_jax.base.video import read_mp4

SCALE, COLUMNS, MARGIN, LABEL = 3, 4, 10, 46  # pixels, except COLUMNS


def sheet(clips: list[np.ndarray], captions: list[str], frame: int) -> Image.Image:
    """Return frame number `frame` of all clips (uint8 [T, H, W, 3], one size) as one picture."""
    height, width = (size * SCALE for size in clips[0].shape[1:3])
    rows = -(-len(clips) // COLUMNS)
    picture = Image.new('RGB', (COLUMNS * (width + MARGIN) + MARGIN, rows * (height + LABEL) + MARGIN), 'white')
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for index, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        left = MARGIN + index % COLUMNS * (width + MARGIN)
        top = MARGIN + index // COLUMNS * (height + LABEL)
        tile = Image.fromarray(clip[frame]).resize((width, height), Image.Resampling.NEAREST)
        picture.paste(tile, (left, top))
        draw.multiline_text((left, top + height + 3), '\n'.join(textwrap.wrap(caption, 30)), 'black', font)
    return picture


def main() -> None:
    """Write the GIF of all videos of a folder, in the order of the prompts file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else '')
    parser.add_argument('--videos', type=pathlib.Path, required=True, help='folder of PROMPT-0.mp4 files')
    parser.add_argument('--prompts-file', type=pathlib.Path, default='docs/pictures/prompts.txt')
    parser.add_argument('--out', type=pathlib.Path, required=True, help='the GIF')
    args = parser.parse_args()
    captions = args.prompts_file.read_text().splitlines()
    clips = [read_mp4(args.videos / f'{caption}-0.mp4') for caption in captions]
    frames = [sheet(clips, captions, index).quantize(64) for index in range(len(clips[0]))]
    frames[0].save(args.out, save_all=True, append_images=frames[1:], duration=1000 // 12, loop=0, optimize=True)


if __name__ == '__main__':
    main()
