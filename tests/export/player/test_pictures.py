"""First frames from files: the player reads every picture as the library does, or both refuse it."""

import struct
import zlib

import numpy as np
import pytest
from neodragon_phone import colors as colors_of_player
from neodragon_phone.errors import BundleError
from neodragon_phone.pictures import MAX_PIXELS, read_frame, to_frame
from PIL import Image, ImageCms

from neodragon_jax.base import color_tags
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.video import image_to_frame, picture_to_frame, read_image
from support.color_profiles import exchanged_profile, linear_profile
from support.png_tags import TAGS, with_chunks

ORIENTATION = 0x0112
SIZE = 16, 24
# Modes that Pillow writes, by format; those of CLEAR with transparency.
MODES = {
    'png': ('1', 'L', 'P', 'RGB'),
    'jpg': ('1', 'L', 'RGB', 'CMYK', 'YCbCr'),
    'tiff': ('1', 'L', 'P', 'RGB', 'CMYK', 'YCbCr'),
    'bmp': ('1', 'L', 'P', 'RGB'),
    'ppm': ('1', 'L', 'RGB'),
    'gif': ('1', 'L', 'P', 'RGB'),
    'webp': ('1', 'L', 'P', 'RGB', 'CMYK'),
}
CLEAR = {'png': ('RGBA', 'LA', 'P'), 'webp': ('RGBA', 'LA', 'P'), 'gif': ('RGBA',), 'tiff': ('RGBA', 'LA')}


def colors(height=40, width=56):
    """Return a picture without symmetry, smooth enough for JPEG."""
    rows, columns = np.mgrid[:height, :width]
    channels = (255 * rows / height, 255 * columns / width, 127 + 127 * np.sin(rows / 5 + columns / 9))
    return np.stack(channels, axis=-1).astype(np.uint8)


def clear(mode):
    """Return a picture that is transparent on the left, and a bit in the middle."""
    alpha = np.broadcast_to(np.linspace(-255, 255, 56).clip(0).astype(np.uint8), (40, 56))
    picture = Image.fromarray(np.concatenate([colors(), alpha[..., None]], axis=-1))
    return picture.quantize() if mode == 'P' else picture.convert(mode)


def sixteen_bits():
    """Return a PNG file of 16 bits per color, which Pillow does not write."""
    rows = b''.join(b'\0' + (row.astype('>u2') * 257 + 40).tobytes() for row in colors(8, 8).reshape(8, -1))
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', 8, 8, 16, 2, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


def turned(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def both_read(path):
    """Return a picture that both routes read to the same numbers."""
    expected = picture_to_frame(read_image(path), *SIZE)
    np.testing.assert_array_equal(read_frame(path, *SIZE), expected)
    return expected


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'tiff'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_photo_stands_upright(tmp_path, suffix, orientation):
    path = tmp_path / f'photo.{suffix}'
    Image.fromarray(colors()).save(path, exif=turned(orientation))
    frame = both_read(path)
    Image.fromarray(colors()).save(path)
    assert np.array_equal(frame, both_read(path)) == (orientation == 1)


@pytest.mark.parametrize(('mode', 'suffix'), [(mode, suffix) for suffix, modes in CLEAR.items() for mode in modes])
def test_transparent_areas_are_white(tmp_path, mode, suffix):
    path = tmp_path / f'clear.{suffix}'
    clear(mode).save(path)
    assert (both_read(path)[:, 0] > 0.9).all()


@pytest.mark.parametrize('key', [0, (0, 0, 255)])
def test_a_color_can_be_transparent(tmp_path, key):
    picture = Image.fromarray(np.zeros((16, 24), np.uint8) if key == 0 else np.full((16, 24, 3), key, np.uint8))
    picture.save(tmp_path / 'key.png', transparency=key)
    assert (both_read(tmp_path / 'key.png') == 1).all()


@pytest.mark.parametrize(('mode', 'suffix'), [(mode, suffix) for suffix, modes in MODES.items() for mode in modes])
def test_pictures_of_every_mode(tmp_path, mode, suffix):
    Image.fromarray(colors()).convert(mode).save(tmp_path / f'picture.{suffix}')
    both_read(tmp_path / f'picture.{suffix}')


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'P', 'L', 'CMYK'])
@pytest.mark.parametrize('profile', ['exchanged', 'sRGB', 'damaged'])
def test_colors_are_those_of_the_profile(tmp_path, mode, profile):
    path = tmp_path / ('picture.jpg' if mode == 'CMYK' else 'picture.png')
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    content = {'exchanged': exchanged_profile(), 'sRGB': srgb, 'damaged': b'damaged'}[profile]
    Image.new(mode, (24, 16), 'red').save(path, icc_profile=content)
    frame = both_read(path)
    if mode in ('RGB', 'RGBA', 'P'):
        assert np.abs(frame - ([-1, -1, 1] if profile == 'exchanged' else [1, -1, -1])).max() < 0.1


@pytest.mark.parametrize('mode', ['RGB', 'L', 'LA', 'P'])
@pytest.mark.parametrize('name', ['GIMP built-in Linear sRGB', 'another'])
def test_a_profile_is_judged_by_its_colors(tmp_path, mode, name):
    Image.new(mode, (24, 16), 'gray').save(tmp_path / 'plain.png')
    Image.new(mode, (24, 16), 'gray').save(tmp_path / 'linear.png', icc_profile=linear_profile(name))
    difference = both_read(tmp_path / 'linear.png') - both_read(tmp_path / 'plain.png')
    assert difference.min() > 0.4 or mode == 'P'


@pytest.mark.parametrize('profile', [False, True])
@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('kind', TAGS)
def test_tags_of_colors(tmp_path, kind, mode, profile):
    path = tmp_path / 'picture.png'
    Image.new(mode, (24, 16), 'gray').save(path, icc_profile=exchanged_profile() if profile else None)
    path.write_bytes(with_chunks(path.read_bytes(), TAGS[kind][0]))
    refused = not TAGS[kind][1]
    if refused and (b'cICP' in TAGS[kind][0] or not profile) and (kind, mode) != ('P3', 'L'):
        assert_both_refuse(path, 'has other colors than sRGB')
    else:
        both_read(path)


def test_the_players_lists_of_colors_are_the_librarys():
    assert colors_of_player.PRIMARIES == color_tags.PRIMARIES
    assert colors_of_player.TRANSFERS == color_tags.TRANSFERS


def test_sixteen_bits_of_rgb_are_read_and_of_gray_refused(tmp_path):
    (tmp_path / 'rgb.png').write_bytes(sixteen_bits())
    both_read(tmp_path / 'rgb.png')
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / 'gray.png')
    assert_both_refuse(tmp_path / 'gray.png', 'more than 8 bits per color')


def test_what_one_refuses_the_other_refuses_with_the_same_words(tmp_path):
    Image.fromarray(colors()).save(tmp_path / 'whole.png')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'whole.png').read_bytes()[:80])
    (tmp_path / 'text.png').write_text('no picture')
    Image.new('RGB', (16, 16)).save(tmp_path / 'hdr.avif')
    for name in ('cut.png', 'text.png', 'hdr.avif', 'absent.png'):
        assert_both_refuse(tmp_path / name, 'give a PNG or JPEG file')
    for side in (9_000, 20_000):
        Image.new('1', (side, side)).save(tmp_path / 'large.png')
        assert_both_refuse(tmp_path / 'large.png', f'pixels, more than {MAX_PIXELS}|more than {MAX_PIXELS} pixels')


def assert_both_refuse(path, message):
    with pytest.raises(InputError, match=message) as library:
        read_image(path)
    with pytest.raises(BundleError, match=message) as player:
        read_frame(path, *SIZE)
    assert str(player.value) == str(library.value)


@pytest.mark.parametrize(('size', 'target'), [((33, 47), (16, 24)), ((20, 12), (64, 30)), ((16, 16), (16, 8))])
def test_drawn_pictures_are_resized_as_in_the_library(size, target):
    picture = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    np.testing.assert_array_equal(to_frame(picture, *target), image_to_frame(picture, *target))
