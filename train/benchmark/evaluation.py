"""Evaluation of the benchmark's systems: the attributes of videos of held-out captions are read from the pixels.

Every system gets the same captions, noise and given first frames, so that two systems differ by their weights alone.

Legend: N captions, F frames, H W pixels.
"""

from __future__ import annotations

import dataclasses
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
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.generation import pipeline
from neodragon_jax.generation.plan import make_plan
from neodragon_jax.models.vae import CausalVAE, posterior_mean
from neodragon_jax.pyramid.sampler import DrawnNoise
from neodragon_jax.pyramid.schedule import Schedule
from train.benchmark import outdated
from train.benchmark.chain import Chain
from train.benchmark.evidence import CLIPS, DRAWN, GIVEN, SECOND
from train.benchmark.motion import motion_columns
from train.benchmark.systems import System
from train.benchmark.tiers import Tier
from train.shapes.attributes import Attributes, Estimate, columns, estimate, measure, summarize
from train.shapes.fill import read_fill
from train.shapes.world import WORLDS, Traits
from train.vae.clips import to_float
from train.vae.reconstruction import quality

Videos = UInt8[np.ndarray, 'N F H W 3']
# Number of videos generated at a time, and number of videos on a contact sheet.
BATCH, SHOWN = 32, 6


class HeldOutCaptions:
    """Held-out captions of a tier, and the comparison of videos with them."""

    def __init__(self, tier: Tier) -> None:
        """Draw the scenes."""
        self.tier, self.world = tier, WORLDS[tier.world]
        source = outdated.held_out_scenes(tier)
        self.combinations = outdated.combinations_of(source)
        self.captions = [source.caption(index) for index in range(len(source))]
        self.expected: list[Traits] = [source.scene(index).traits for index in range(len(source))]
        self.drawn: Videos = np.stack([source[index]['video'] for index in range(len(source))])

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

    What the seed's evaluation.json has of the same weights, sampling and captions is not evaluated again, nor what an
    older version stored without them. A student that was never trained is named and left out.

    Raises:
      InputError: another system is not trained.
    """
    held_out, folder = HeldOutCaptions(chain.tier), chain.folder / 'evaluation'
    results, wanted = outdated.read_results(chain), outdated.identities(chain)
    vaes, systems = outdated.autoencoders(chain), outdated.all_systems(chain)

    def keep(name: str, videos: Videos, more: Mapping[str, list[float]] = {}, **numbers: Any) -> None:
        clips = columns(held_out.read(videos)) | {SECOND: held_out.second(videos)} | dict(more)
        if held_out.world.omitted:
            clips |= motion_columns(videos, held_out.world)
        means = {column: list(estimate(np.array(values), held_out.told)) for column, values in clips.items()}
        results[name] = means | numbers | dict(wanted[name] or {}) | {CLIPS: clips}
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        show(folder / f'{name}.png', videos)
        outdated.write_results(chain, results)

    todo = _trained(chain, wanted, outdated.due(wanted, results))
    for name in tqdm.tqdm(todo, desc='evaluation', unit='system', disable=None):
        if name == DRAWN:
            keep(name, held_out.drawn)
        elif name in vaes:
            videos = held_out.reconstruct(vaes[name])
            more = {'psnr_db': psnr_db(videos, held_out.drawn)}
            keep(name, videos, more, decoder_parameters=_decoder_parameters(vaes[name]))
        else:
            system, _, first = name.rpartition('/')
            keep(name, held_out.generate(systems[system], first, chain.seed))
    return results


def _trained(chain: Chain, wanted: Mapping[str, outdated.Identity | None], names: Sequence[str]) -> list[str]:
    """Return the names of results without those of students that were never trained; print the latter.

    Raises:
      InputError: something else is absent.
    """
    absent = dict.fromkeys(name.partition('/')[0] for name in names if wanted[name] is None)
    for name in absent:
        if name not in chain.students[1:]:
            raise InputError(f'{chain.folder}: {name} is not trained, or its folders are incomplete. Leave out --only.')
        print(f'seed {chain.seed}: student {name} is not trained, and left out. Leave out --only to train it.')
    return [name for name in names if wanted[name] is not None]


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
