"""Sample videos of the multi-step teacher as latents, the training data of the step distillation.

    python -m train.teacher_samples --checkpoint CKPT --prompts-file prompts.txt --out SAMPLES --count 350000

Writes the latents and the conditioning of each prompt, and once the conditioning of the negative prompt. Run the same
command again to resume after the last complete shard. With --distributed on several machines, each writes its own
shards.

Legend: B batch, T latent frames, H W latent grid, C channels, L text tokens, D width.
Source: Neodragon, arXiv 2511.06055, section on step distillation (350K teacher samples).
"""

from __future__ import annotations

import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from neodragon_jax.base.command_line import PathOption, add_checkpoint, add_distributed, command_parser, exit_status
from neodragon_jax.base.compile_cache import use_compile_cache
from neodragon_jax.base.output import output_folder
from neodragon_jax.base.processes import separate_shares
from neodragon_jax.base.progress import ProgressBar
from neodragon_jax.generation import defaults as generation
from neodragon_jax.generation.arguments import released
from neodragon_jax.generation.options import VideoOptions
from neodragon_jax.generation.tokens import cut_notice
from neodragon_jax.models.attention import STRATEGIES
from train.data import DTYPES, SampleSpec, SampleWriter
from train.data.first_frames import describe_pairs
from train.data.sources import EVALUATION_VIDEOS, held_out_indices, is_enough
from train.flow.first_frames import DRAWN, GENERATED
from train.flow.stage_starts import start_shapes
from train.flow.teacher_sampler import Request, TeacherSampler, TeacherSamplesOptions, load_teacher, make_request
from train.runtime.platform import AUTO

# Options that override generation.json.
_CHOICES = (
    *('frames', 'height', 'width', 'steps', 'first_steps', 'guidance', 'first_guidance'),
    *('prompt_modifier', 'negative_prompt'),
)


_EXAMPLES = """
examples:
  the data of the paper's distillation; the checkpoint's first-frame model draws the first frame of every video:
    python -m train.teacher_samples --checkpoint CKPT --prompts-file prompts.txt --out SAMPLES --count 350000

  the same on every machine of a TPU pod, SAMPLES on a disk that all of them see:
    python -m train.teacher_samples --checkpoint CKPT --prompts-file prompts.txt --out SAMPLES --count 350000 \\
        --distributed --batch 4

  the first frame of every video is a picture:
    python -m train.teacher_samples --checkpoint CKPT --prompts-file prompts.txt --first-frame PICTURES \\
        --out SAMPLES --count 350000

  first frames alone, the data of configs/dmd.py:prompts:
    python -m train.teacher_samples --checkpoint CKPT --prompts-file prompts.txt --frames 1 --out FRAMES --count 100000

The same command resumes an interrupted run.
"""


def parse_options(argv: Sequence[str] | None = None) -> TeacherSamplesOptions:
    """Return the options of a command line.

    Raises:
      InputError: an option is out of range, or a path is not local.
    """
    description = 'Write latents of videos that the multi-step teacher samples: the training data of train.dmd.'
    parser = command_parser('python -m train.teacher_samples', description, _EXAMPLES)
    _add_files(parser.add_argument_group('checkpoint, prompts and samples').add_argument)
    _add_sampling(parser.add_argument_group('videos').add_argument)
    _add_computation(parser.add_argument_group('computation').add_argument)
    args = vars(parser.parse_args(argv))
    if args['first_frame'] in map(pathlib.Path, (GENERATED, DRAWN)):
        args['first_frame'] = str(args['first_frame'])
    return TeacherSamplesOptions(video=VideoOptions(**{name: args.pop(name) for name in _CHOICES}), **args)


def _add_files(add: Callable[..., Any]) -> None:
    """Add the options of inputs and outputs."""
    add_checkpoint(add)
    add('--teacher', action=PathOption, bucket=True, metavar='DIR',
        help="RUN/result of train.teacher or train.pruning, sampled in place of the checkpoint's multi-step "
        'denoiser')  # fmt: skip
    add('--prompts-file', action=PathOption, bucket=True, required=True, metavar='FILE',
        help='prompts: text with one per line, JSON, JSONL or CSV')  # fmt: skip
    add('--out', action=PathOption, bucket=True, required=True, metavar='DIR', help='folder of the samples')
    add('--count', required=True, type=int, metavar='N',
        help='number of samples; the prompts are used in turn, repeatedly')  # fmt: skip
    add('--samples-per-shard', type=int, default=256, metavar='N', help='samples per file (default: %(default)s)')
    add('--store-dtype', choices=tuple(DTYPES), default='bfloat16', help='type on disk (default: %(default)s)')
    add('--store-starts', action='store_true',
        help='also store the starts of all stages, for config.dmd.pairs; a third more space')  # fmt: skip


def _add_sampling(add: Callable[..., Any]) -> None:
    """Add the options of the videos; those that are left out take the values of generation.json."""
    values, many = generation.RELEASED, generation.RELEASED.monolithic
    steps, first_steps = (' '.join(map(str, counts)) for counts in (many.steps, many.first_steps))
    add('--first-frame', action=PathOption, metavar=f'{DRAWN}|{GENERATED}|DIR|FILE',
        help=f"source of unit 0, that of the student's videos: {DRAWN}, the checkpoint's first-frame model; "
        f'{GENERATED}, the teacher; a folder of pictures that are numbered like the prompts, from 0 or 1; or a table '
        'with the columns file and caption, whose captions are the prompts. Pictures are cropped at the center to the '
        f"video's shape ({released(values.hybrid.first_frame)})")  # fmt: skip
    add('--frames', type=int, metavar='N', help=f'video frames, 8 n + 1 ({released(values.frames)})')
    add('--height', type=int, metavar='PX', help=f'height of the videos ({released(values.height)})')
    add('--width', type=int, metavar='PX', help=f'width of the videos ({released(values.width)})')
    add('--steps', type=int, nargs=3, metavar='N', help=f'steps per stage ({released(steps)})')
    add('--first-steps', type=int, nargs=3, metavar='N', help=f'steps per stage of unit 0 ({released(first_steps)})')
    add('--guidance', type=float, metavar='G', help=f'guidance scale ({released(f"{many.guidance:g}")})')
    add('--first-guidance', type=float, metavar='G',
        help=f'guidance scale of unit 0 ({released(f"{many.first_guidance:g}")})')  # fmt: skip
    add('--prompt-modifier', metavar='TEXT', help=f'text appended to every prompt ({released("the released one")})')
    add('--negative-prompt', metavar='TEXT',
        help=f'text that guidance steers away from ({released("the released one")})')  # fmt: skip
    add('--seed', type=int, default=0, help='seed of all samples, 0 to 4294967295 (default: %(default)s)')


def _add_computation(add: Callable[..., Any]) -> None:
    """Add the options of devices and types."""
    add('--batch', type=int, default=1, metavar='N', help='samples at a time on each device (default: %(default)s)')
    add('--dtype', choices=tuple(DTYPES), default='bfloat16', help="the denoiser's compute type (default: %(default)s)")
    add('--attention', choices=(AUTO, *STRATEGIES), default=AUTO, help='form of the attention (default: %(default)s)')
    add('--fsdp', type=int, default=1, metavar='N',
        help='devices over which the denoiser is split, for one that is too large (default: %(default)s)')  # fmt: skip
    add('--tensor', type=int, default=1, metavar='N', help='devices that share its heads (default: %(default)s)')
    add_distributed(add)


def records(teacher: TeacherSampler, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the samples of some indices, in order; each batch fills all devices."""
    prompts = teacher.request.prompts
    size = teacher.request.options.batch * teacher.groups
    for start in range(0, len(indices), size):
        batch = list(indices[start : start + size])
        padded = batch + [batch[-1]] * (size - len(batch))
        prompt, latents, starts = jax.device_get(teacher.draw(padded))
        for row, index in enumerate(batch):
            yield {
                'index': index,
                'prompt': prompts[index % len(prompts)],
                'latents': latents[row],
                'text': prompt.text[row],
                'text_mask': prompt.mask[row],
                'pooled': prompt.pooled[row],
            } | {name: array[row] for name, array in starts.items()}


def run(options: TeacherSamplesOptions) -> None:
    """Write all samples that are missing.

    Raises:
      InputError: an argument, the checkpoint or the folder is not usable.
    """
    # The others wait a minute for this process, and the request may download gigabytes.
    with separate_shares(options.distributed, options.start_timeout_s, options.out) as (index, count):
        request = make_request(options)
        use_compile_cache(tell=index == 0)
        with output_folder(options.out, index, count):
            if index == 0:
                print(_describe_first_frames(request))
                print(_notice_of_few(request), end='')
            write_samples(load_teacher(request))


def _describe_first_frames(request: Request) -> str:
    """Return the source of the first frames, and the students that it is for."""
    if request.pictures is not None:
        return describe_pairs(request.pictures, request.prompts)
    if request.first_frame == DRAWN:
        return "first frames: drawn by the checkpoint's first-frame model, for students that are given them, too"
    return 'first frames: sampled by the teacher, for students that generate them, too'


def _notice_of_few(request: Request) -> str:
    """Return the line on videos that are too few, or of too few prompts, for `train.dmd`, or ''."""
    count, prompts = request.options.count, len(request.prompts)
    left, held_out = held_out_indices(count, EVALUATION_VIDEOS, prompts)
    if request.settings.size[0] == 1 or is_enough(left, held_out):
        return ''
    return (
        f'train.dmd will refuse these samples: it holds out {EVALUATION_VIDEOS} of them and their prompts, and '
        f'{len(left)} are left of {count} samples of {prompts} prompts. Stop, and give many more than '
        f'{EVALUATION_VIDEOS} prompts and samples; or set config.dmd.evaluation.videos and config.loop.evaluate_every '
        'of train.dmd to 0.\n'
    )


def _writer(teacher: TeacherSampler) -> SampleWriter:
    """Return the writer of this process's share of the samples."""
    options = teacher.request.options
    return SampleWriter(
        options.out,
        _spec(teacher),
        options.count,
        protocol=teacher.request.protocol(),
        samples_per_shard=options.samples_per_shard,
        part=jax.process_index(),
        parts=jax.process_count(),
    )


def _spec(teacher: TeacherSampler) -> SampleSpec:
    """Return the shapes and types of a sample."""
    plan, options = teacher.plan, teacher.request.options
    shape = (plan.frames, plan.height, plan.width, plan.channels)
    return SampleSpec(
        latents=shape,
        text=teacher.negative.text.shape,
        pooled=teacher.negative.pooled.shape[0],
        latents_dtype=options.store_dtype,
        text_dtype=options.store_dtype,
        starts=start_shapes(shape, plan.schedule.stages) if options.store_starts else {},
    )


def write_samples(teacher: TeacherSampler) -> None:
    """Write the missing samples of this process."""
    request, first = teacher.request, jax.process_index() == 0
    options, tokenizers = request.options, teacher.components.tokenizers
    notice = cut_notice(tokenizers.t5, request.prompts, request.settings.modifier) if first and tokenizers else ''
    print(notice, end='\n' if notice else '')
    with _writer(teacher) as writer:
        if first:
            writer.write_negative(*jax.device_get(teacher.negative))
        missing, start = writer.missing(), time.monotonic()
        for record in ProgressBar(records(teacher, missing), total=len(missing), unit='sample', hidden=not first):
            writer.append(record)
    seconds = time.monotonic() - start
    print(f'{options.out}: {len(missing)} samples written by process {jax.process_index()} in {seconds:.1f} s, '
          f'{len(missing) / seconds:.3f} per second; {writer.state}')  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(parse_options(argv)))


if __name__ == '__main__':
    sys.exit(main())
