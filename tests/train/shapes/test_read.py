"""The reader of videos of moving shapes: right and wrong videos are counted, captions are held out."""

from __future__ import annotations

import pytest

from neodragon_jax.base.video import write_mp4
from train.shapes import read
from train.shapes.captions import parse
from train.shapes.drawing import draw
from train.shapes.world import CPU, Scene

ASKED = 'a small red circle moves right on a blue background'


def test_a_wrong_shape_is_counted_and_named(tmp_path, capsys):
    wrong = parse(ASKED)._replace(shape='square')
    for number, traits in enumerate((parse(ASKED), wrong)):
        write_mp4(tmp_path / f'{ASKED}-{number}.mp4', draw(Scene(traits), 17, 64, 64), 24)
    assert read.main(['--videos', str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert '| color | 2 | 1.000 |' in said and '| shape | 1 | 0.500 |' in said and '| steady | 2 | 1.000 |' in said
    assert '| shape, second reader | 1 | 0.500 |' in said
    assert said[-1] == f'{ASKED}-1.mp4: shape square'


def test_captions_are_held_out_and_different(capsys):
    assert read.main(['--captions', '48']) == 0
    captions = capsys.readouterr().out.splitlines()
    assert len(set(captions)) == 48 and all(CPU.is_held_out(parse(caption)) for caption in captions)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'give either --videos DIR or --captions'),
        (['--videos', 'x', '--captions', '3'], 'give either --videos'),
        (['--captions', '49'], 'give 1 to 48'),
        (['--videos', 'nowhere'], 'no .mp4 in it'),
    ],
)
def test_wrong_options_are_refused(arguments, message, capsys):
    assert read.main(arguments) == 2
    assert message in capsys.readouterr().err
