"""Evaluation of the benchmark's systems: the attributes of videos of held-out captions are read from the pixels.

Every system gets the same captions, noise and given first frames, so that two systems differ by their weights alone.

Legend: N captions, F frames, H W pixels.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Float, UInt8
from PIL import Image

from neodragon_jax.base import video
from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.json_file import read_json
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.fingerprint import fingerprint
from neodragon_jax.generation import pipeline
from neodragon_jax.generation.plan import make_plan
from neodragon_jax.models.vae import CausalVAE, posterior_mean
from neodragon_jax.pyramid.sampler import DrawnNoise
from neodragon_jax.pyramid.schedule import Schedule
from train.benchmark.chain import AUTOENCODER, VAE, Chain
from train.benchmark.continuation import Continuation
from train.benchmark.evidence import CLIPS, COMBINATIONS, DRAWN, GIVEN, SECOND, WEIGHTS
from train.benchmark.motion import motion_columns
from train.benchmark.recovery import Recovery
from train.benchmark.systems import System, systems
from train.benchmark.tiers import Tier
from train.shapes.attributes import Attributes, Estimate, columns, estimate, measure, summarize
from train.shapes.fill import read_fill
from train.shapes.source import MovingShapesSource
from train.shapes.world import WORLDS, Traits
from train.vae.clips import to_float
from train.vae.reconstruction import quality

Videos = UInt8[np.ndarray, 'N F H W 3']
# Seed of the held-out scenes; training scenes have a different one.
SCENES_SEED = 1_000_003
# Number of videos generated at a time, and number of videos on a contact sheet.
BATCH, SHOWN = 32, 6


class HeldOutCaptions:
    """Held-out captions of a tier, and the comparison of videos with them."""

    def __init__(self, tier: Tier) -> None:
        """Draw the scenes."""
        self.tier, self.world = tier, WORLDS[tier.world]
        size = (tier.height, tier.width)
        source = MovingShapesSource(self.world, tier.frames, size, SCENES_SEED, tier.captions, 'held_out', True)
        self.captions = [source.caption(index) for index in range(len(source))]
        self.expected: list[Traits] = [source.scene(index).traits for index in range(len(source))]
        self.drawn: Videos = np.stack([source[index]['video'] for index in range(len(source))])

    @property
    def combinations(self) -> list[int]:
        """The number of each clip's combination of attributes."""
        every = self.world.combinations('all')
        return [every.index(expected) for expected in self.expected]

    @property
    def told(self) -> list[Traits]:
        """What each caption tells, by which clips are clustered: a model sees nothing else."""
        return [self.world.captioned(expected) for expected in self.expected]

    def read(self, videos: Videos) -> list[Attributes]:
        """Return the attributes of the video of each caption."""
        return [measure(clip, expected, self.world) for clip, expected in zip(videos, self.expected, strict=True)]

    def second(self, videos: Videos) -> list[float]:
        """Return 1 or 0 for the video of each caption: whether the second reader sees its shape."""
        seen = zip(videos, self.expected, strict=True)
        return [float(read_fill(clip).shape == expected.shape) for clip, expected in seen]

    def __call__(self, videos: Videos) -> dict[str, Estimate]:
        """Return the accuracy of every attribute, and the means of the numbers."""
        return summarize(self.read(videos), self.told)

    def generate(self, system: System, first_frame: str, seed: int) -> Videos:
        """Return a video for each caption.

        Args:
          first_frame: GENERATED, or GIVEN for the first frame of the drawn scene.
        """
        tier = self.tier
        components = pipeline.load(system.root, 'monolithic', system.denoiser, system.adapter)
        size = (tier.frames, tier.height, tier.width)
        guidance = (system.guidance, system.guidance)
        plan = make_plan('monolithic', *size, system.steps, system.first_steps, *guidance)
        schedule = Schedule(spacing=system.spacing)
        plan = dataclasses.replace(plan, guidance=guidance[0], first_guidance=guidance[1], schedule=schedule)
        plan = components.check(plan)
        made = []
        for start in range(0, len(self.captions), BATCH):
            rows = slice(start, start + BATCH)
            captions = self.captions[rows]
            keys = pipeline.sample_keys(seed, captions, range(start, start + len(captions)))
            first = _floats(self.drawn[rows, :1]) if first_frame == GIVEN else None
            made.append(pipeline.generate(components, plan, captions, DrawnNoise(keys), '', first))
        return np.concatenate(made)

    def reconstruct(self, folder: pathlib.Path) -> Videos:
        """Return the drawn videos as reconstructed by a VAE.

        Raises:
          InputError: the folder holds something else.
        """
        module, params = checkpoint.load(folder, CausalVAE)

        @jax.jit
        def run(params: Any, clip: Any) -> Any:
            moments: Any = module.apply({'params': params}, clip, method='encode')
            return module.apply({'params': params}, posterior_mean(moments), method='decode')

        return np.concatenate([video.to_uint8(np.asarray(run(params, _floats(clip[None])))) for clip in self.drawn])


def psnr_db(videos: Videos, wanted: Videos) -> list[float]:
    """Return the value of each clip, in decibel."""
    return [float(quality(got, want).psnr) for got, want in zip(videos, wanted, strict=True)]


def _floats(clips: UInt8[np.ndarray, '*S 3']) -> Float[np.ndarray, '*S 3']:
    return np.asarray(to_float(jnp.asarray(clips)))


def evaluate(chain: Chain) -> dict[str, Any]:
    """Evaluate every system of a seed; return and store the results and contact sheets.

    Systems that are in the seed's evaluation.json with the same weights, or from a version without record of
    them, are not evaluated again. A student that was never trained is named and left out.
    """
    held_out, folder = HeldOutCaptions(chain.tier), chain.folder / 'evaluation'
    record = chain.folder / 'evaluation.json'
    results: dict[str, Any] = read_json(record, dict[str, Any]) if record.is_file() else {}

    def keep(name: str, videos: Videos, weights: str, more: Mapping[str, list[float]] = {}, **numbers: Any) -> None:
        clips = columns(held_out.read(videos)) | {SECOND: held_out.second(videos)} | dict(more)
        if held_out.world.omitted:
            clips |= motion_columns(videos, held_out.world)
        means = {column: list(estimate(np.array(values), held_out.told)) for column, values in clips.items()}
        results[name] = means | numbers | {WEIGHTS: weights, CLIPS: clips, COMBINATIONS: held_out.combinations}
        folder.mkdir(parents=True, exist_ok=True)
        show(folder / f'{name}.png', videos)
        with atomic_file(record) as path:
            path.write_text(json.dumps(results, indent=1) + '\n')

    def is_new(name: str, weights: str) -> bool:
        return name not in results or results[name].get(WEIGHTS, weights) != weights

    if is_new(DRAWN, ''):
        keep(DRAWN, held_out.drawn, '')
    for name, vae in autoencoders(chain).items():
        if is_new(name, weights := fingerprint(vae)):
            videos = held_out.reconstruct(vae)
            more = {'psnr_db': psnr_db(videos, held_out.drawn)}
            keep(name, videos, weights, more, decoder_parameters=_decoder_parameters(vae))
    todo = [
        (f'{name}/{first}', system, first)
        for name, system in trained(chain).items()
        for first in chain.first_frames
        if is_new(f'{name}/{first}', system.weights)
    ]
    for name, system, first in tqdm.tqdm(todo, desc='evaluation', unit='system', disable=None):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        keep(name, held_out.generate(system, first, chain.seed), system.weights)
    return results


def trained(chain: Chain) -> dict[str, System]:
    """Return the systems of a seed, but for students that were never trained; print the names of those."""
    found = chain.systems() if isinstance(chain, Recovery) else systems(chain)
    absent = [name for name in chain.students[1:] if not (found[name].denoiser / 'config.json').is_file()]
    for name in absent:
        print(f'seed {chain.seed}: student {name} is not trained, and left out. Leave out --only to train it.')
    return {name: system for name, system in found.items() if name not in absent}


def autoencoders(chain: Chain) -> dict[str, pathlib.Path]:
    """Return the video VAEs to evaluate, by name; a continuation trains none."""
    if isinstance(chain, Continuation):
        return {'small': chain.start / VAE}
    return {
        'native': chain.out / 'autoencoder' / 'result' / AUTOENCODER,
        'small': chain.out / 'decoder' / 'result' / VAE,
    }


def show(path: pathlib.Path, videos: Videos) -> None:
    """Write the first videos as strips of frames, one below the other, on one picture."""
    shown = videos[:SHOWN]
    frames = np.linspace(0, shown.shape[1] - 1, min(9, shown.shape[1])).round().astype(int)
    rows = [np.concatenate(list(clip[frames]), axis=1) for clip in shown]
    with atomic_file(path) as partial:
        Image.fromarray(np.concatenate(rows, axis=0)).save(partial, format='PNG')


def _decoder_parameters(folder: pathlib.Path) -> int:
    _, params = checkpoint.load(folder)
    parts: Sequence[str] = ('decoder', 'post_quant_conv')
    tree: Mapping[str, Any] = {name: params[name] for name in parts if name in params}
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))
