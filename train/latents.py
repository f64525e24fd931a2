"""Clips become latents, and captions what the denoiser knows of them: the data that denoisers train on.

    python -m train.latents --checkpoint CKPT --clips CLIPS --out LATENTS

CLIPS is a folder of train.captioned_clips, of one size or of several; LATENTS gets the same subfolders. All devices of
this machine work; with --distributed, all machines, each on shards of its own. Started again with the same command, it
goes on after the last clip that was finished.

A sample holds

    latents    [T, H, W, C]  normalized, as the denoiser sees them
    units      []            latents that count, here all T; train.data.mixture pads pictures and says 1
    text etc.                see train.data.conditioning
    prompt, file             as of the clip: its caption, without modifier, and where it comes from

and beside the samples lie two more conditionings: negative.npz, what guidance steers away from, and null.npz, of the
empty prompt, which takes the place of dropped captions.

Legend: B batch, F frames, Y X pixels, T latent frames, H W latent grid, C channels.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from neodragon_jax.base.command_line import exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.processes import start_processes
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.fingerprint import fingerprint
from neodragon_jax.checkpoint.folders import ADAPTER_FOLDERS, VIDEO_VAE
from neodragon_jax.checkpoint.params import read_params
from neodragon_jax.generation import pipeline
from neodragon_jax.generation.devices import Spread
from neodragon_jax.generation.plan import make_plan
from neodragon_jax.generation.tokens import DEFAULT_NEGATIVE_PROMPT
from neodragon_jax.models.vae import (
    CausalVAE,
    encode_chunked,
    normalize,
    posterior_mean,
    posterior_sample,
)
from train.data import DTYPES, ArraySpec, RecordSpec, SampleWriter
from train.data.clip_source import ClipSource
from train.data.conditioning import CONTENTS, Conditioner, load_conditioner
from train.data.manifest import is_sample_set
from train.data.parallel import ordered_map
from train.data.stored_conditioning import NEGATIVE, NULL
from train.vae.flat_convolutions import flat_convolutions

EXAMPLES = """
examples:
  for a denoiser (train.dmd and others), all sizes, on all devices of this machine:
    python -m train.latents --checkpoint CKPT --clips CLIPS --out LATENTS

  the same on every machine of a TPU pod, CLIPS and LATENTS on a disk that all of them see:
    python -m train.latents --checkpoint CKPT --clips CLIPS --out LATENTS --distributed --batch 4

  with the states of the teacher's T5, for training a context adapter along:
    python -m train.latents --checkpoint CKPT --clips CLIPS --out LATENTS --text t5 --text-encoder T5_XXL
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        'python -m train.latents',
        description='Encode captioned clips: VAE latents and text states.',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--checkpoint', required=True, metavar='DIR', help='root of a checkpoint in the released layout')
    add('--clips', required=True, metavar='DIR', help='folder of train.captioned_clips: all sizes, or one of them')
    add('--out', required=True, metavar='DIR', help='folder of the latents')
    add('--text', choices=CONTENTS, default='states',
        help='states: what the denoiser reads; t5: before the adapter; ids: tokens (default: states)')  # fmt: skip
    add('--mode', choices=tuple(ADAPTER_FOLDERS), default='monolithic',
        help='whose context adapter makes the states: that of the multi-step model, which training begins with '
        '(monolithic, the default), or of the few-step model (hybrid)')  # fmt: skip
    add('--text-encoder', metavar='DIR', help="T5 folder in place of the checkpoint's; with --text t5")
    add('--prompt-modifier', default='', metavar='TEXT', help='appended to every caption (default: nothing)')
    add('--negative-prompt', default=DEFAULT_NEGATIVE_PROMPT, metavar='TEXT', help='what guidance steers away from')
    add('--posterior', choices=('sample', 'mean'), default='sample',
        help='which latent of the distribution that the VAE gives (default: %(default)s)')  # fmt: skip
    add('--seed', type=int, default=0, help="of the posterior's samples (default: %(default)s)")
    add('--batch', type=int, default=1, metavar='N', help='clips at a time on each device (default: %(default)s)')
    add('--window', type=int, default=16, metavar='N',
        help='frames encoded at a time, a multiple of 8: less memory, the same result (default: 16)')  # fmt: skip
    add('--dtype', choices=tuple(DTYPES), default='bfloat16', help='compute type (default: %(default)s)')
    add('--store-dtype', choices=tuple(DTYPES), default='bfloat16', help='type on disk (default: %(default)s)')
    add('--samples-per-shard', type=int, default=256, metavar='N', help='default: %(default)s')
    add('--readers', type=int, default=4, metavar='N', help='threads that decode clips (default: %(default)s)')
    add('--distributed', action='store_true', help='one of several processes that JAX recognizes')
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The video encoder on all devices of this process.

    Attributes:
      size: clips that one call takes.
      window: see `encode_chunked`.
    """

    vae: CausalVAE
    params: Any
    fingerprint: str
    spread: Spread
    key: PRNGKeyArray
    sample: bool
    size: int
    window: int

    def __call__(
        self, clips: Sequence[UInt8[np.ndarray, 'F Y X 3']], indices: Sequence[int]
    ) -> Float[np.ndarray, 'B T H W C']:
        """Return the normalized latents of at most `size` clips; each depends on clip, index and seed alone."""
        full = lambda rows: [*rows, *[rows[-1]] * (self.size - len(rows))]
        video, numbers = self.spread.shard((np.stack(full(clips)), np.array(full(indices), np.int32)))
        with flat_convolutions(jax.default_backend() == 'cpu'):
            moments = encode_chunked(self.vae, self.params, _to_range(video), self.window)
        latents = _to_latents(moments, self.key, numbers, self.sample)
        return jax.device_get(latents)[: len(clips)]


@jax.jit
def _to_range(video: UInt8[Array, 'B F Y X 3']) -> Float[Array, 'B F Y X 3']:
    """Return bytes as numbers in [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1


@functools.partial(jax.jit, static_argnames='sample')
def _to_latents(
    moments: Float[Array, 'B T H W M'], key: PRNGKeyArray, indices: Int[Array, ' B'], sample: bool
) -> Float[Array, 'B T H W C']:
    """Return the normalized mean, or a sample whose noise depends on the clip's index."""
    moments = moments.astype(jnp.float32)
    mean = posterior_mean(moments)
    if not sample:
        return normalize(mean)
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    return normalize(posterior_sample(moments, noise))


def load_encoder(args: argparse.Namespace, spread: Spread) -> Encoder:
    """Return the video encoder of a command line.

    Raises:
      InputError: the checkpoint has none, or it is damaged.
    """
    folder = checkpoint.component_folder(args.checkpoint, VIDEO_VAE)
    vae = checkpoint.load_module(folder, CausalVAE)
    return Encoder(
        vae=vae.clone(dtype=jnp.dtype(args.dtype)),
        params=spread.replicate(read_params(folder, jnp.dtype(args.dtype), 'encoder', 'quant_conv')),
        fingerprint=fingerprint(folder),
        spread=spread,
        key=spread.replicate(jax.random.key(args.seed)),
        sample=args.posterior == 'sample',
        size=args.batch * len(spread.devices),
        window=args.window,
    )


def find_sets(clips: pathlib.Path, out: pathlib.Path) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Return (folder of clips, folder of their latents) of every size.

    Raises:
      InputError: there are no clips.
    """
    if not clips.is_dir():
        raise InputError(f'--clips {clips}: no such folder. Give a folder of train.captioned_clips.')
    if is_sample_set(clips):
        return [(clips, out)]
    sets = sorted(child for child in clips.iterdir() if child.is_dir() and is_sample_set(child))
    if not sets:
        raise InputError(f'--clips {clips}: no dataset in it. Give a folder of train.captioned_clips.')
    return [(folder, out / folder.name) for folder in sets]


def records(
    source: ClipSource, indices: Sequence[int], encoder: Encoder, conditioner: Conditioner, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield the samples of some clips, in order; each batch fills all devices while the next ones are decoded."""
    batches = [indices[start : start + encoder.size] for start in range(0, len(indices), encoder.size)]
    samples = ordered_map(source.__getitem__, indices, args.readers, ahead=args.readers + 2 * encoder.size)
    for batch in batches:
        clips = [next(samples) for _ in batch]
        latents = encoder([clip['video'] for clip in clips], batch)
        text = conditioner([clip['prompt'] + args.prompt_modifier for clip in clips])
        for row, clip in enumerate(clips):
            yield {
                'index': batch[row],
                'latents': latents[row],
                'units': latents.shape[1],
                **{name: clip[name] for name in source.texts},
                **{name: array[row] for name, array in text.items()},
            }


def protocol(
    source: ClipSource, encoder: Encoder, conditioner: Conditioner, args: argparse.Namespace
) -> dict[str, Any]:
    """Return how the samples come about: what a resumed run, and training on them, must agree on."""
    names = ('prompt_modifier', 'negative_prompt', 'posterior', 'seed', 'dtype', 'mode')
    given: dict[str, Any] = {name: getattr(args, name) for name in names}
    given |= {'content': conditioner.content, 'clips': source.protocol, 'vae': encoder.fingerprint}
    return given | conditioner.fingerprints


def write_latents(
    clips: pathlib.Path, out: pathlib.Path, encoder: Encoder, conditioner: Conditioner, args: argparse.Namespace
) -> None:
    """Write the latents of one dataset of clips, as far as they are missing."""
    source = ClipSource(clips)
    given = source.protocol
    plan = make_plan('hybrid', given['frames'], given['height'], given['width'])
    channels = encoder.vae.config.encoder_out_channels
    arrays = {
        'latents': ArraySpec((plan.frames, plan.height, plan.width, channels), args.store_dtype),
        'units': ArraySpec((), 'int32'),
        **conditioner.specs(args.store_dtype),
    }
    writer = SampleWriter(
        out,
        RecordSpec(arrays, texts=source.texts),
        len(source),
        protocol=protocol(source, encoder, conditioner, args),
        samples_per_shard=args.samples_per_shard,
        part=jax.process_index(),
        parts=jax.process_count(),
        name='latents',
    )
    with writer:
        first = jax.process_index() == 0
        if first:
            writer.write_conditioning(NEGATIVE, conditioner.one(args.negative_prompt))
            writer.write_conditioning(NULL, conditioner.one(''))
        missing, start = writer.missing(), time.monotonic()
        bar = tqdm.tqdm(total=len(missing), unit='clip', desc=out.name, disable=None if first else True)
        with bar:
            for record in records(source, missing, encoder, conditioner, args):
                writer.append(record)
                bar.update()
    seconds = time.monotonic() - start
    print(f'{out}: {len(missing)} of {len(source)} clips encoded by process {jax.process_index()} in {seconds:.1f} s, '
          f'{len(missing) / seconds:.2f} per second, compilation included')  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Write the latents of all datasets of clips.

    Raises:
      InputError: an argument, the checkpoint, or a folder is not usable.
    """
    for name in ('batch', 'window', 'readers', 'samples_per_shard'):
        if getattr(args, name) < 1:
            raise InputError(f'--{name.replace("_", "-")} is {getattr(args, name)}; give at least 1.')
    if args.window % pipeline.TEMPORAL_FACTOR:
        raise InputError(f'--window is {args.window}; give a multiple of {pipeline.TEMPORAL_FACTOR}.')
    if args.text_encoder and args.text != 't5':
        raise InputError(f'--text-encoder goes with --text t5, not with --text {args.text}; add that, or leave it out.')
    sets = find_sets(pathlib.Path(args.clips), pathlib.Path(args.out))
    start_processes(args.distributed)
    spread = Spread(jax.local_devices())
    encoder = load_encoder(args, spread)
    conditioner = load_conditioner(
        args.checkpoint,
        args.text,
        mode=args.mode,
        text_encoder=args.text_encoder,
        dtype=jnp.dtype(args.dtype),
        spread=spread,
        batch=args.batch,
    )
    for clips, out in sets:
        write_latents(clips, out, encoder, conditioner, args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(parse_args(argv)))


if __name__ == '__main__':
    sys.exit(main())
