"""Sample videos of the multi-step teacher as latents, the training data of the step distillation.

    python -m train.teacher_samples --checkpoint CKPT --prompts-file prompts.txt --out SAMPLES --count 350000

Writes the latents and the conditioning of each prompt, and once the conditioning of the negative prompt. Run the same
command again to resume after the last complete shard. With --distributed on several machines, each writes its own
shards.

Legend: B batch, T latent frames, H W latent grid, C channels, L text tokens, D width.
Source: Neodragon, arXiv 2511.06055, section on step distillation (350K teacher samples).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array, Float

from neodragon_jax.base import video
from neodragon_jax.base.command_line import command_parser, exit_status
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


_EXAMPLES = """
examples:
  the data of the paper's distillation; the first frame of every video is a picture:
    python -m train.teacher_samples --checkpoint CKPT --prompts-file prompts.txt --first-frame PICTURES \\
        --out SAMPLES --count 350000

  the same on every machine of a TPU pod, SAMPLES on a disk that all of them see:
    python -m train.teacher_samples --checkpoint CKPT --prompts-file prompts.txt --first-frame PICTURES \\
        --out SAMPLES --count 350000 --distributed --batch 4

The same command resumes an interrupted run.
"""


@dataclasses.dataclass(frozen=True)
class TeacherSamplesOptions:
    """Options of this command; see --help for each."""

    checkpoint: str
    prompts_file: str
    out: str
    count: int
    first_frame: str
    frames: int
    height: int
    width: int
    steps: Sequence[int]
    first_steps: Sequence[int]
    guidance: float
    first_guidance: float
    prompt_modifier: str
    negative_prompt: str
    seed: int
    batch: int
    samples_per_shard: int
    dtype: str
    store_dtype: str
    distributed: bool

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InputError(f'--batch is {self.batch}; give at least 1.')


def parse_options(argv: Sequence[str] | None = None) -> TeacherSamplesOptions:
    """Return the options of a command line.

    Raises:
      InputError: an option is out of range.
    """
    description = 'Write latents of videos that the multi-step teacher samples: the training data of train.dmd.'
    parser = command_parser('python -m train.teacher_samples', description, _EXAMPLES)
    _add_files(parser.add_argument_group('checkpoint, prompts and samples').add_argument)
    _add_sampling(parser.add_argument_group('videos').add_argument)
    _add_computation(parser.add_argument_group('computation').add_argument)
    return TeacherSamplesOptions(**vars(parser.parse_args(argv)))


def _add_files(add: Callable[..., Any]) -> None:
    """Add the options of inputs and outputs."""
    add('--checkpoint', required=True, metavar='DIR', help='root of a checkpoint in the released layout')
    add('--prompts-file', required=True, metavar='FILE', help='prompts: text with one per line, JSON, JSONL or CSV')
    add('--out', required=True, metavar='DIR', help='folder of the sample set')
    add('--count', required=True, type=int, metavar='N',
        help='number of samples; the prompts are used in turn, repeatedly')  # fmt: skip
    add('--samples-per-shard', type=int, default=256, metavar='N', help='samples per file (default: %(default)s)')
    add('--store-dtype', choices=tuple(DTYPES), default='bfloat16', help='type on disk (default: %(default)s)')


def _add_sampling(add: Callable[..., Any]) -> None:
    """Add the options of the videos and of their sampling."""
    add('--first-frame', default=GENERATED, metavar=f'{GENERATED}|DIR',
        help='source of unit 0: the teacher, or a folder with one picture per prompt, in the order of their names '
        '(default: %(default)s)')  # fmt: skip
    add('--frames', type=int, default=49, metavar='N', help='video frames, 8 n + 1 (default: %(default)s)')
    add('--height', type=int, default=320, metavar='PX', help='height of the videos (default: %(default)s)')
    add('--width', type=int, default=512, metavar='PX', help='width of the videos (default: %(default)s)')
    add('--steps', type=int, nargs=3, default=(10, 10, 10), metavar='N', help='steps per stage (default: 10 10 10)')
    add('--first-steps', type=int, nargs=3, default=(20, 20, 20), metavar='N',
        help='steps per stage of unit 0 (default: 20 20 20)')  # fmt: skip
    add('--guidance', type=float, default=5.0, metavar='G', help='guidance scale (default: %(default)s)')
    add('--first-guidance', type=float, default=7.0, metavar='G',
        help='guidance scale of unit 0 (default: %(default)s)')  # fmt: skip
    add('--prompt-modifier', default=DEFAULT_MODIFIER, metavar='TEXT',
        help='text appended to every prompt (default: the released one)')  # fmt: skip
    add('--negative-prompt', default=DEFAULT_NEGATIVE_PROMPT, metavar='TEXT',
        help='text that guidance steers away from (default: the released one)')  # fmt: skip
    add('--seed', type=int, default=0, help='seed of all samples (default: %(default)s)')


def _add_computation(add: Callable[..., Any]) -> None:
    """Add the options of devices and types."""
    add('--batch', type=int, default=1, metavar='N', help='samples at a time on each device (default: %(default)s)')
    add('--dtype', choices=tuple(DTYPES), default='bfloat16', help="the denoiser's compute type (default: %(default)s)")
    add('--distributed', action='store_true',
        help='this is one of several processes on a TPU pod, under Slurm or Open MPI')  # fmt: skip


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
    options: TeacherSamplesOptions
    prompts: list[str]
    pictures: list[pathlib.Path] | None

    def draw(self, indices: Sequence[int]) -> tuple[Prompt, Float[Array, 'B T H W C']]:
        """Return the conditioning and the latents of some samples, which depend on their indices and the seed only."""
        options, prompts = self.options, [self.prompts[index % len(self.prompts)] for index in indices]
        numbers = [index // len(self.prompts) for index in indices]
        prompt = self.spread.shard(self.components.encode_prompt([text + options.prompt_modifier for text in prompts]))
        noise = DrawnNoise(self.spread.shard(pipeline.sample_keys(options.seed, prompts, numbers)))
        first = None
        if self.pictures is not None:
            frames = [self._frame(self.pictures[index % len(self.prompts)]) for index in indices]
            first = pipeline.encode_first_frame(self.components, self.spread.shard(jnp.asarray(frames)[:, None]), noise)
        return prompt, sample(self.denoise, self.plan, prompt, noise, first_frame=first)

    def _frame(self, path: pathlib.Path) -> np.ndarray:
        return video.image_to_frame(video.read_image(path), self.options.height, self.options.width)


def load_teacher(options: TeacherSamplesOptions) -> TeacherSampler:
    """Return the teacher that the options describe.

    Raises:
      InputError: an option or the checkpoint is not usable.
    """
    prompts = read_prompts(options.prompts_file)
    pictures = None if options.first_frame == GENERATED else find_pictures(options.first_frame, len(prompts))
    plan = make_plan('monolithic', options.frames, options.height, options.width, options.steps, options.first_steps)
    plan = dataclasses.replace(plan, guidance=None, first_guidance=None)
    spread = Spread(jax.local_devices())
    components = pipeline.load(options.checkpoint, 'monolithic', dtype=jnp.dtype(options.dtype), place=spread.replicate)
    negative = jax.tree.map(lambda leaf: leaf[0], components.encode_prompt([options.negative_prompt]))
    denoise = guided(components.denoise, negative, scale_by_unit(options.guidance, options.first_guidance))
    return TeacherSampler(components, denoise, components.check(plan), negative, spread, options, prompts, pictures)


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


def protocol(options: TeacherSamplesOptions, prompts: Sequence[str]) -> dict[str, Any]:
    """Return the settings of the samples; a resumed run and any training on the samples must have the same."""
    names = ('frames', 'height', 'width', 'steps', 'first_steps', 'guidance', 'first_guidance', 'prompt_modifier')
    given = {name: getattr(options, name) for name in (*names, 'negative_prompt', 'seed', 'dtype')}
    first = GENERATED if options.first_frame == GENERATED else 'pictures'
    return given | {
        'first_frame': first,
        'prompts': hashlib.sha256('\n'.join(prompts).encode()).hexdigest()[:16],
        'teacher': fingerprint(checkpoint.component_folder(options.checkpoint, TEACHER)),
        'adapter': fingerprint(checkpoint.component_folder(options.checkpoint, TEACHER_ADAPTER)),
    }


def records(teacher: TeacherSampler, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the samples of some indices, in order; each batch fills all devices."""
    size = teacher.options.batch * len(teacher.spread.devices)
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


def run(options: TeacherSamplesOptions) -> None:
    """Write all samples that are missing.

    Raises:
      InputError: an option, the checkpoint or the folder is not usable.
    """
    start_processes(options.distributed)
    teacher = load_teacher(options)
    plan = teacher.plan
    negative = jax.device_get(teacher.negative)
    spec = SampleSpec(
        latents=(plan.frames, plan.height, plan.width, plan.channels),
        text=negative.text.shape,
        pooled=negative.pooled.shape[0],
        latents_dtype=options.store_dtype,
        text_dtype=options.store_dtype,
    )
    writer = SampleWriter(
        options.out,
        spec,
        options.count,
        protocol=protocol(options, teacher.prompts),
        samples_per_shard=options.samples_per_shard,
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
    print(f'{options.out}: {len(missing)} samples written by process {jax.process_index()} in {seconds:.1f} s, '
          f'{len(missing) / seconds:.3f} per second')  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(parse_options(argv)))


if __name__ == '__main__':
    sys.exit(main())
