"""The W8A16 bundle of the shipped checkpoint, played without JAX, against JAX on captions unseen by calibration.

    pytest -n0 -m slow -s tests/export/player/test_accuracy.py

exports the checkpoint first. NEODRAGON_BUNDLE=phone/bundle measures an existing bundle of it.
NEODRAGON_BACKEND=simulator plays it on the HTP simulator, which takes minutes per video; NEODRAGON_CAPTIONS=8 takes
fewer captions.
"""

from __future__ import annotations

import os
import pathlib
from typing import NamedTuple

import numpy as np
import pytest
from neodragon_phone.backends import open_backend
from neodragon_phone.bundle import Bundle
from neodragon_phone.generation import Request, generate
from neodragon_phone.player import Player, snr_db

from export.__main__ import main, make_options, parse_args
from export.host.phone_program import PhoneProgram
from export.host.recording import Scenes
from train.shapes.attributes import Attributes, measure, summarize
from train.shapes.captions import caption, parse
from train.shapes.world import CPU

BACKEND = os.environ.get('NEODRAGON_BACKEND', 'cpu')
CAPTIONS = int(os.environ.get('NEODRAGON_CAPTIONS', '48'))
# Allowed difference between the shares of right attributes.
POINTS = 0.03
# Target for the last latent frame, in which all errors accumulate: the worst of the first captions.
LATENTS_DB, JUDGED = 25.0, 8


class Pair(NamedTuple):
    """A caption's video by the player and by JAX, from the same seed; the ratio is that of the last latent frame."""

    caption: str
    played: Attributes
    in_jax: Attributes
    latents_db: float


@pytest.fixture(scope='module')
def pairs(tmp_path_factory) -> list[Pair]:
    out, given = tmp_path_factory.mktemp('export'), os.environ.get('NEODRAGON_BUNDLE')
    arguments = ['--checkpoint', 'moving_shapes', '--no-simulate', '--no-whole-video', '--out', str(out)]
    if given is None:
        assert main(arguments) == 0
    bundle = Bundle.open(pathlib.Path(given or out / 'bundle'))
    player = Player(bundle, open_backend(BACKEND, bundle, None))
    options = make_options(parse_args(arguments))
    program = PhoneProgram(options.program, options.denoiser, options.names).open_recording().program
    found = []
    for seed, text in enumerate(unseen(bundle)):
        played, in_jax = generate(player, Request(text, seed)), program.generate(Scenes([text], portable=True), seed)
        assert in_jax.frames is not None and in_jax.latents is not None
        attributes = (measure(np.asarray(frames), parse(text), CPU) for frames in (played.frames, in_jax.frames[0]))
        found.append(Pair(text, *attributes, snr_db(in_jax.latents[0, -1], played.latents[-1])))
        print(f'{found[-1].latents_db:.1f} dB  {text}', flush=True)
    return found


def unseen(bundle: Bundle) -> list[str]:
    """Return captions that neither ranges nor settings were chosen on: evaluation prompts first."""
    calibration = bundle.manifest['checkpoint']['calibration']
    seen = {*calibration['prompts'], *calibration['validation_prompts']}
    world = dict.fromkeys(map(caption, CPU.combinations('all')))
    texts = [text for text in dict.fromkeys([*calibration['evaluation_prompts'], *world]) if text in world]
    return [text for text in texts if text not in seen][:CAPTIONS]


@pytest.mark.slow
def test_attributes_are_as_in_jax(pairs):
    assert len({pair.caption for pair in pairs}) == CAPTIONS
    played, in_jax = (summarize([getattr(pair, name) for pair in pairs]) for name in ('played', 'in_jax'))
    for name in ('color', 'shape', 'direction', 'background', 'all'):
        print(f'{name}: player {played[name].mean:.3f}, JAX {in_jax[name].mean:.3f}')
        assert abs(played[name].mean - in_jax[name].mean) <= POINTS, name


@pytest.mark.slow
def test_the_last_latents_are_jaxs(pairs):
    ratios = [pair.latents_db for pair in pairs]
    print(f'last latent frame, dB: lowest of {JUDGED} {min(ratios[:JUDGED]):.1f}, of {CAPTIONS} {min(ratios):.1f}, '
          f'median {np.median(ratios):.1f}')  # fmt: skip
    assert min(ratios[:JUDGED]) >= LATENTS_DB
