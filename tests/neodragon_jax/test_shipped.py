"""Tests of the shipped checkpoint: it is small, and its videos show their prompts."""

from __future__ import annotations

import pytest

from neodragon_jax.__main__ import main
from neodragon_jax.base.video import read_mp4
from neodragon_jax.checkpoint import shipped
from train.shapes.attributes import measure, summarize
from train.shapes.captions import caption, parse
from train.shapes.world import CPU

MEGABYTES = 10
PROMPT = 'a small red circle moves right on a blue background'


def test_it_is_small():
    root = shipped.find(None)
    assert sum(path.stat().st_size for path in root.rglob('*') if path.is_file()) < MEGABYTES * 1e6


@pytest.fixture(scope='module')
def prompts() -> list[str]:
    """Return the example, and every second held-out combination in the documented and in random wordings."""
    held_out = CPU.combinations('held_out')[::2]
    drawn = (caption(traits, row) for row, traits in enumerate(held_out))
    return list(dict.fromkeys([PROMPT, *map(caption, held_out), *drawn]))


@pytest.mark.parametrize('mode', ['hybrid', pytest.param('monolithic', marks=pytest.mark.slow)])
def test_its_videos_show_what_is_asked(prompts, mode, tmp_path):
    options = [option for prompt in prompts for option in ('--prompt', prompt)]
    assert main([*options, '--mode', mode, '--out', str(tmp_path)]) == 0
    seen = [measure(read_mp4(tmp_path / f'{prompt}-0.mp4'), parse(prompt), CPU) for prompt in prompts]
    means = {name: value.mean for name, value in summarize(seen).items()}
    print({name: round(value, 3) for name, value in means.items()})
    right = seen[0].correct()
    assert right['color'] and right['direction'] and right['background']
    assert means['background'] == 1 and means['color'] >= 0.9 and means['direction'] >= 0.9
    assert means['shape'] >= 0.9 and means['all'] >= 0.9 and means['steady'] >= 0.8
    assert means['mismatch'] < 0.2 and 0.9 < means['motion'] < 1.1
