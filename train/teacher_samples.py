"""Sample videos of the multi-step teacher as latents, the training data of the step distillation.

    python -m train.teacher_samples --checkpoint CKPT --prompts-file prompts.txt --out SAMPLES --count 350000

Writes the latents and the conditioning of each prompt, and once the conditioning of the negative prompt. Run the same
command again to resume after the last complete shard. With --distributed on several machines, each writes its own
shards.

Legend: B batch, T latent frames, H W latent grid, C channels, L text tokens, D width.
Source: Neodragon, arXiv 2511.06055, section on step distillation (350K teacher samples).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array, Float

from neodragon_jax.base import video
from neodragon_jax.base.command_line import exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.processes import start_processes
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.fingerprint import fingerprint
from neodragon_jax.checkpoint.folders import TEACHER, TEACHER_ADAPTER
from neodragon_jax.evaluation.prompt_files import read_prompts
from neodragon_jax.generation import pipeline
from neodragon_jax.generation.devices import Spread
from neodragon_jax.generation.plan import make_plan
from neodragon_jax.generation.tokens import DEFAULT_MODIFIER, DEFAULT_NEGATIVE_PROMPT
from neodragon_jax.pyramid.sampler import Denoiser, DrawnNoise, Plan, Prompt, guided, sample
from train.data import DTYPES, SampleSpec, SampleWriter
from train.flow.guidance import scale_by_unit

GENERATED = 'generated'
PICTURES = ('.png', '.jpg', '.jpeg', '.webp')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser('python -m train.teacher_samples', description='Sample the multi-step teacher.')
    add = parser.add_argument
    add('--checkpoint', required=True, metavar='DIR', help='root of a checkpoint in the released layout')
    add('--prompts-file', required=True, metavar='FILE', help='text file with one prompt per line')
    add('--out', required=True, metavar='DIR', help='folder of the samples')
    add(
        '--count',
        required=True,
        type=int,
        metavar='N',
        help='number of samples; the prompts are used in turn, repeatedly',
    )
    add('--first-frame', default=GENERATED, metavar=f'{GENERATED}|DIR',
        help='source of unit 0: the teacher, or a folder with one picture per prompt, in the order of their names '
        '(default: %(default)s)')  # fmt: skip
    add('--frames', type=int, default=49, metavar='N', help='video frames, 8 n + 1 (default: %(default)s)')
    add('--height', type=int, default=320, metavar='PX', help='default: %(default)s')
    add('--width', type=int, default=512, metavar='PX', help='default: %(default)s')
    add('--steps', type=int, nargs=3, default=(10, 10, 10), metavar='N', help='steps per stage (default: 10 10 10)')
    add('--first-steps', type=int, nargs=3, default=(20, 20, 20), metavar='N', help='of unit 0 (default: 20 20 20)')
    add('--guidance', type=float, default=5.0, metavar='G', help='default: %(default)s')
    add('--first-guidance', type=float, default=7.0, metavar='G', help='of unit 0 (default: %(default)s)')
    add('--prompt-modifier', default=DEFAULT_MODIFIER, metavar='TEXT', help='appended to every prompt')
    add(
        '--negative-prompt', default=DEFAULT_NEGATIVE_PROMPT, metavar='TEXT', help='text that guidance steers away from'
    )
    add('--seed', type=int, default=0, help='default: %(default)s')
    add('--batch', type=int, default=1, metavar='N', help='samples at a time on each device (default: %(default)s)')
    add('--samples-per-shard', type=int, default=256, metavar='N', help='default: %(default)s')
    add('--dtype', choices=tuple(DTYPES), default='bfloat16', help="the denoiser's compute type (default: %(default)s)")
    add('--store-dtype', choices=tuple(DTYPES), default='bfloat16', help='type on disk (default: %(default)s)')
    add('--distributed', action='store_true', help='one of several processes that JAX recognizes')
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class TeacherSampler:
    """The multi-step system on all devices of this process.

    Attributes:
      denoise: the denoiser with guidance.
      plan: sampling plan, without guidance.
      negative: conditioning of the negative prompt: text [L, D], mask [L], pooled [p].
      pictures: first frames, one per prompt; None if the teacher samples them.
    """

    components: pipeline.Components
    denoise: Denoiser
    plan: Plan
    negative: Prompt
    spread: Spread
    args: argparse.Namespace
    prompts: list[str]
    pictures: list[pathlib.Path] | None

    def draw(self, indices: Sequence[int]) -> tuple[Prompt, Float[Array, 'B T H W C']]:
        """Return the conditioning and the latents of some samples, which depend on their indices and the seed only."""
        args, prompts = self.args, [self.prompts[index % len(self.prompts)] for index in indices]
        numbers = [index // len(self.prompts) for index in indices]
        prompt = self.spread.shard(self.components.encode_prompt([text + args.prompt_modifier for text in prompts]))
        noise = DrawnNoise(self.spread.shard(pipeline.sample_keys(args.seed, prompts, numbers)))
        first = None
        if self.pictures is not None:
            frames = [self._frame(self.pictures[index % len(self.prompts)]) for index in indices]
            first = pipeline.encode_first_frame(self.components, self.spread.shard(jnp.asarray(frames)[:, None]), noise)
        return prompt, sample(self.denoise, self.plan, prompt, noise, first_frame=first)

    def _frame(self, path: pathlib.Path) -> np.ndarray:
        return video.image_to_frame(video.read_image(path), self.args.height, self.args.width)


def load_teacher(args: argparse.Namespace) -> TeacherSampler:
    """Return the teacher of a command line.

    Raises:
      InputError: an argument or the checkpoint is not usable.
    """
    prompts = read_prompts(args.prompts_file)
    pictures = None if args.first_frame == GENERATED else find_pictures(args.first_frame, len(prompts))
    if args.batch < 1:
        raise InputError(f'--batch is {args.batch}; give at least 1.')
    plan = make_plan('monolithic', args.frames, args.height, args.width, args.steps, args.first_steps)
    plan = dataclasses.replace(plan, guidance=None, first_guidance=None)
    spread = Spread(jax.local_devices())
    components = pipeline.load(args.checkpoint, 'monolithic', dtype=jnp.dtype(args.dtype), place=spread.replicate)
    negative = jax.tree.map(lambda leaf: leaf[0], components.encode_prompt([args.negative_prompt]))
    denoise = guided(components.denoise, negative, scale_by_unit(args.guidance, args.first_guidance))
    return TeacherSampler(components, denoise, components.check(plan), negative, spread, args, prompts, pictures)


def find_pictures(folder: str | os.PathLike[str], count: int) -> list[pathlib.Path]:
    """Return the pictures in a folder, by name.

    Raises:
      InputError: the folder is absent, or does not hold `count` pictures.
    """
    if not pathlib.Path(folder).is_dir():
        raise InputError(f'--first-frame {folder}: no such folder. Give a folder of pictures, or "{GENERATED}".')
    found = sorted(path for path in pathlib.Path(folder).iterdir() if path.suffix.lower() in PICTURES)
    if len(found) != count:
        raise InputError(f'--first-frame {folder}: {len(found)} pictures for {count} prompts; give one per prompt.')
    return found


def protocol(args: argparse.Namespace, prompts: Sequence[str]) -> dict[str, Any]:
    """Return the settings of the samples; a resumed run and any training on the samples must have the same."""
    names = ('frames', 'height', 'width', 'steps', 'first_steps', 'guidance', 'first_guidance', 'prompt_modifier')
    given = {name: getattr(args, name) for name in (*names, 'negative_prompt', 'seed', 'dtype')}
    first = GENERATED if args.first_frame == GENERATED else 'pictures'
    return given | {
        'first_frame': first,
        'prompts': hashlib.sha256('\n'.join(prompts).encode()).hexdigest()[:16],
        'teacher': fingerprint(checkpoint.component_folder(args.checkpoint, TEACHER)),
        'adapter': fingerprint(checkpoint.component_folder(args.checkpoint, TEACHER_ADAPTER)),
    }


def records(teacher: TeacherSampler, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the samples of some indices, in order; each batch fills all devices."""
    size = teacher.args.batch * len(teacher.spread.devices)
    for start in range(0, len(indices), size):
        batch = list(indices[start : start + size])
        padded = batch + [batch[-1]] * (size - len(batch))
        prompt, latents = jax.device_get(teacher.draw(padded))
        for row, index in enumerate(batch):
            yield {
                'index': index,
                'prompt': teacher.prompts[index % len(teacher.prompts)],
                'latents': latents[row],
                'text': prompt.text[row],
                'text_mask': prompt.mask[row],
                'pooled': prompt.pooled[row],
            }


def run(args: argparse.Namespace) -> None:
    """Write all samples that are missing.

    Raises:
      InputError: an argument, the checkpoint or the folder is not usable.
    """
    start_processes(args.distributed)
    teacher = load_teacher(args)
    plan = teacher.plan
    negative = jax.device_get(teacher.negative)
    spec = SampleSpec(
        latents=(plan.frames, plan.height, plan.width, plan.channels),
        text=negative.text.shape,
        pooled=negative.pooled.shape[0],
        latents_dtype=args.store_dtype,
        text_dtype=args.store_dtype,
    )
    writer = SampleWriter(
        args.out,
        spec,
        args.count,
        protocol=protocol(args, teacher.prompts),
        samples_per_shard=args.samples_per_shard,
        part=jax.process_index(),
        parts=jax.process_count(),
    )
    with writer:
        if jax.process_index() == 0:
            writer.write_negative(*negative)
        missing, start = writer.missing(), time.monotonic()
        hidden = None if jax.process_index() == 0 else True
        for record in tqdm.tqdm(records(teacher, missing), total=len(missing), unit='sample', disable=hidden):
            writer.append(record)
    seconds = time.monotonic() - start
    print(f'{args.out}: {len(missing)} samples written by process {jax.process_index()} in {seconds:.1f} s, '
          f'{len(missing) / seconds:.3f} per second')  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(parse_args(argv)))


if __name__ == '__main__':
    sys.exit(main())
