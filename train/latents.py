"""Encode captioned clips into VAE latents and text conditioning, the training data of denoisers.

    python -m train.latents --checkpoint CKPT --clips CLIPS --out LATENTS

CLIPS is a folder of train.captioned_clips, of one size or of several; LATENTS gets the same subfolders. All devices of
this machine are used; with --distributed, those of all machines, each for its own shards. The same command resumes a
stopped run after the last finished clip.

A sample holds

    latents    [T, H, W, C]  normalized, as input of the denoiser
    units      []            number of valid latent frames, here T; 1 for pictures that train.data.mixture pads
    text etc.                see train.data.conditioning
    prompt, file             the clip's caption without modifier, and the clip's file

Two more conditionings are stored beside the samples: negative.npz for the negative prompt, and null.npz for the empty
prompt, which replaces dropped captions.

Legend: B batch, F frames, Y X pixels, T latent frames, H W latent grid, C channels.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from neodragon_jax.base.bucket import StoragePath
from neodragon_jax.base.command_line import PathOption, add_checkpoint, add_distributed, command_parser, exit_status
from neodragon_jax.base.compile_cache import use_compile_cache
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.output import output_folder
from neodragon_jax.base.processes import separate_shares
from neodragon_jax.base.progress import ProgressBar
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.fingerprint import fingerprint
from neodragon_jax.checkpoint.folders import ADAPTER_FOLDERS, VIDEO_VAE
from neodragon_jax.checkpoint.params import read_params
from neodragon_jax.generation import defaults as generation
from neodragon_jax.generation.defaults import TEMPORAL_FACTOR
from neodragon_jax.generation.devices import Spread
from neodragon_jax.generation.options import check_seed
from neodragon_jax.generation.plan import make_plan
from neodragon_jax.generation.tokens import cut_prompts
from neodragon_jax.models.vae import CausalVAE
from train.data import DTYPES, ArraySpec, RecordSpec, SampleWriter
from train.data.clip_source import ClipSource
from train.data.conditioning import CONTENTS, Conditioner, load_conditioner
from train.data.manifest import is_sample_set
from train.data.parallel import ordered_map
from train.data.stored_conditioning import NEGATIVE, NULL
from train.vae.encoder import Encoder

EXAMPLES = """
examples:
  for a denoiser (train.dmd and others), all sizes, on all devices of this machine:
    python -m train.latents --checkpoint CKPT --clips CLIPS --out LATENTS

  the same on every machine of a TPU pod, CLIPS and LATENTS on a disk that all of them see:
    python -m train.latents --checkpoint CKPT --clips CLIPS --out LATENTS --distributed --batch 4

  with the states of the teacher's T5, to train a context adapter together with the denoiser:
    python -m train.latents --checkpoint CKPT --clips CLIPS --out LATENTS --text t5 --text-encoder T5_XXL
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    description = 'Encode captioned clips into VAE latents and text conditioning, the training data of denoisers.'
    parser = command_parser('python -m train.latents', description, EXAMPLES)
    add = parser.add_argument_group('files').add_argument
    add_checkpoint(add)
    add('--clips', action=PathOption, required=True, metavar='DIR',
        help='folder of train.captioned_clips: all sizes, or one of them')  # fmt: skip
    add('--out', action=PathOption, bucket=True, required=True, metavar='DIR', help='folder of the latents')
    _add_content(parser.add_argument_group('content of the samples').add_argument)
    _add_computation(parser.add_argument_group('computation').add_argument)
    return parser.parse_args(argv)


def _add_content(add: Callable[..., object]) -> None:
    add('--text', choices=CONTENTS, default='states',
        help='text conditioning to store: states, the output of the context adapter; t5, the states before it; or ids, '
        'the tokens (default: states)')  # fmt: skip
    add('--mode', choices=tuple(ADAPTER_FOLDERS), default='monolithic',
        help='context adapter of the states: of the multi-step model, with which training begins (monolithic, the '
        'default), or of the few-step model (hybrid)')  # fmt: skip
    add('--text-encoder', action=PathOption, bucket=True, metavar='DIR',
        help="T5 folder in place of the checkpoint's; with --text t5")  # fmt: skip
    add('--prompt-modifier', default='', metavar='TEXT', help='text appended to every caption (default: none)')
    add('--negative-prompt', metavar='TEXT',
        help="text that guidance steers away from (default: that of the checkpoint's generation.json)")  # fmt: skip
    add('--posterior', choices=('sample', 'mean'), default='sample',
        help="sample of the VAE's posterior, or its mean (default: %(default)s)")  # fmt: skip
    add('--seed', type=int, default=0, help="seed of the posterior's samples (default: %(default)s)")


def _add_computation(add: Callable[..., object]) -> None:
    add('--batch', type=int, default=1, metavar='N', help='clips at a time on each device (default: %(default)s)')
    add('--window', type=int, default=16, metavar='N',
        help='frames encoded at a time, a multiple of 8; fewer take less memory (default: 16)')  # fmt: skip
    add('--dtype', choices=tuple(DTYPES), default='bfloat16', help='compute type (default: %(default)s)')
    add('--store-dtype', choices=tuple(DTYPES), default='bfloat16', help='type on disk (default: %(default)s)')
    add('--samples-per-shard', type=int, default=256, metavar='N', help='samples per file (default: %(default)s)')
    add('--readers', type=int, default=4, metavar='N', help='threads that decode clips (default: %(default)s)')
    add_distributed(add)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command line; see --help for each."""

    checkpoint: StoragePath | str
    clips: pathlib.Path
    out: StoragePath
    text: str
    mode: str
    text_encoder: StoragePath | None
    prompt_modifier: str
    negative_prompt: str
    posterior: str
    seed: int
    batch: int
    window: int
    dtype: str
    store_dtype: str
    samples_per_shard: int
    readers: int
    distributed: bool
    start_timeout_s: float


def load_encoder(options: Options, spread: Spread) -> Encoder:
    """Return the video encoder of a checkpoint.

    Raises:
      InputError: the checkpoint has none, or it is damaged.
    """
    folder = checkpoint.component_folder(options.checkpoint, VIDEO_VAE)
    vae = checkpoint.load_module(folder, CausalVAE)
    dtype = jnp.dtype(options.dtype)
    return Encoder(
        vae=vae.clone(dtype=dtype),
        params=spread.replicate(read_params(folder, dtype, 'encoder', 'quant_conv')),
        fingerprint=fingerprint(folder),
        spread=spread,
        key=spread.replicate(jax.random.key(options.seed)),
        sample=options.posterior == 'sample',
        size=options.batch * len(spread.devices),
        window=options.window,
    )


def find_sets(clips: pathlib.Path, out: StoragePath) -> list[tuple[pathlib.Path, StoragePath]]:
    """Return (folder of clips, folder of their latents) of every size.

    Raises:
      InputError: there are no clips.
    """
    if not clips.is_dir():
        raise InputError(f'--clips {clips}: no such folder. Give a folder of train.captioned_clips.')
    if is_sample_set(clips):
        return [(clips, out)]
    sets = sorted(child for child in clips.iterdir() if child.name[0] != '.' and is_sample_set(child))
    if not sets:
        raise InputError(f'--clips {clips}: no dataset in it. Give a folder of train.captioned_clips.')
    return [(folder, out / folder.name) for folder in sets]


def records(
    source: ClipSource,
    indices: Sequence[int],
    encoder: Encoder,
    conditioner: Conditioner,
    options: Options,
    cut: list[str],
) -> Iterator[dict[str, Any]]:
    """Yield the samples of some clips, in order; the next clips are decoded while a batch is encoded.

    Args:
      cut: gets the captions that are too long for T5.
    """
    batches = [indices[start : start + encoder.size] for start in range(0, len(indices), encoder.size)]
    samples = ordered_map(source.__getitem__, indices, options.readers, ahead=options.readers + 2 * encoder.size)
    for batch in batches:
        clips = [next(samples) for _ in batch]
        latents = encoder([clip['video'] for clip in clips], batch)
        captions = [clip['prompt'] for clip in clips]
        cut += cut_prompts(conditioner.tokenizer, captions, options.prompt_modifier)
        text = conditioner([caption + options.prompt_modifier for caption in captions])
        for row, clip in enumerate(clips):
            yield {
                'index': batch[row],
                'latents': latents[row],
                'units': latents.shape[1],
                **{name: clip[name] for name in source.texts},
                **{name: array[row] for name, array in text.items()},
            }


def protocol(source: ClipSource, encoder: Encoder, conditioner: Conditioner, options: Options) -> dict[str, Any]:
    """Return the settings of the samples, which a resumed run and training on the samples must share."""
    names = ('prompt_modifier', 'negative_prompt', 'posterior', 'seed', 'dtype', 'mode')
    given: dict[str, Any] = {name: getattr(options, name) for name in names}
    given |= {'content': conditioner.content, 'clips': source.protocol, 'vae': encoder.fingerprint}
    return given | conditioner.fingerprints


def write_latents(
    clips: pathlib.Path, out: StoragePath, encoder: Encoder, conditioner: Conditioner, options: Options
) -> None:
    """Write the missing latents of one set of clips."""
    source = ClipSource(clips)
    writer = _writer(source, out, encoder, conditioner, options)
    with writer:
        first = jax.process_index() == 0
        if first:
            writer.write_conditioning(NEGATIVE, conditioner.one(options.negative_prompt))
            writer.write_conditioning(NULL, conditioner.one(''))
        missing, start, cut = writer.missing(), time.monotonic(), list[str]()
        bar = ProgressBar(total=len(missing), unit='clip', desc=out.name, hidden=not first)
        with bar:
            for record in records(source, missing, encoder, conditioner, options, cut):
                writer.append(record)
                bar.update()
    if cut:
        print(f'{out}: {len(cut)} captions have more than {conditioner.tokenizer.length} tokens and are cut, such as '
              f'"{cut[0][:60]}"')  # fmt: skip
    seconds = time.monotonic() - start
    print(f'{out}: {len(missing)} of {len(source)} clips encoded by process {jax.process_index()} in {seconds:.1f} s, '
          f'{len(missing) / seconds:.2f} per second, compilation included; {writer.state}')  # fmt: skip


def _writer(
    source: ClipSource, out: StoragePath, encoder: Encoder, conditioner: Conditioner, options: Options
) -> SampleWriter:
    """Return the writer of this process's share of the latents."""
    given = source.protocol
    plan = make_plan('hybrid', given['frames'], given['height'], given['width'])
    channels = encoder.vae.config.encoder_out_channels
    arrays = {
        'latents': ArraySpec((plan.frames, plan.height, plan.width, channels), options.store_dtype),
        'units': ArraySpec((), 'int32'),
        **conditioner.specs(options.store_dtype),
    }
    return SampleWriter(
        out,
        RecordSpec(arrays, texts=source.texts),
        len(source),
        protocol=protocol(source, encoder, conditioner, options),
        samples_per_shard=options.samples_per_shard,
        part=jax.process_index(),
        parts=jax.process_count(),
        name='latents',
    )


def read_options(args: argparse.Namespace) -> Options:
    """Return the checked options of a command line; the default negative prompt is that of generation.json.

    Raises:
      InputError: an option is wrong.
    """
    for name in ('batch', 'window', 'readers', 'samples_per_shard'):
        if getattr(args, name) < 1:
            raise InputError(f'--{name.replace("_", "-")} is {getattr(args, name)}; give at least 1.')
    if args.window % TEMPORAL_FACTOR:
        raise InputError(f'--window is {args.window}; give a multiple of {TEMPORAL_FACTOR}.')
    check_seed(args.seed)
    if args.text_encoder and args.text != 't5':
        raise InputError(
            f'--text-encoder needs --text t5, not --text {args.text}; set --text t5, or leave --text-encoder out.'
        )
    given: dict[str, Any] = dict(vars(args))
    if args.negative_prompt is None:
        given['negative_prompt'] = generation.read(given['checkpoint']).negative_prompt
    return Options(**given)


def run(options: Options) -> None:
    """Write the latents of all sets of clips.

    Raises:
      InputError: the checkpoint or a folder is not usable.
    """
    sets = find_sets(options.clips, options.out)
    with separate_shares(options.distributed, options.start_timeout_s, options.out) as (index, count):
        use_compile_cache(tell=index == 0)
        with output_folder(options.out, index, count):
            write_sets(sets, options)


def write_sets(sets: Sequence[tuple[pathlib.Path, StoragePath]], options: Options) -> None:
    """Load the encoders, and write the missing latents of sets of clips, each to its folder."""
    spread = Spread(jax.local_devices())
    encoder = load_encoder(options, spread)
    conditioner = load_conditioner(
        options.checkpoint,
        options.text,
        mode=options.mode,
        text_encoder=options.text_encoder,
        dtype=jnp.dtype(options.dtype),
        spread=spread,
        batch=options.batch,
    )
    for clips, out in sets:
        write_latents(clips, out, encoder, conditioner, options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(read_options(parse_args(argv))))


if __name__ == '__main__':
    sys.exit(main())
