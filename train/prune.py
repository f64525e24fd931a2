"""Choose the blocks that a denoiser can do without, and take them out.

    python -m train.prune select --denoiser FULL --data LATENTS --out CHOICE --remove 6
    python -m train.prune apply --denoiser FULL --keep CHOICE/keep.json --out PRUNED

`train.pruning` then trains what is left; it takes the keep list itself, so `apply` is for looking at a denoiser that
was not trained yet. Killed and started again with the same command, `score` and `select` go on after the last videos.

Source: Neodragon, arXiv 2511.06055, section on block pruning.
Legend: L text tokens, E width of the text states, p pooled width.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from neodragon_jax.base import video
from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.command_line import exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.fingerprint import fingerprint
from neodragon_jax.generation.devices import Spread
from neodragon_jax.models.teacher import TeacherMMDiT
from neodragon_jax.models.vae import CausalVAE, denormalize
from neodragon_jax.pyramid.sampler import Plan, Prompt
from train.data import DTYPES, SampleSource
from train.pruning.importance import Importance
from train.pruning.importance_chart import importance_svg
from train.pruning.keep_list import KEEP, prune, read_keep
from train.pruning.selection import Round, Subject, check_choice, choose, difference
from train.teacher.denoisers import check_widths, read_denoiser
from train.teacher.program import RAW_STATES, STATES

EXAMPLES = """
examples:
  the paper's choice, 24 blocks to 18, looking at frames instead of latents:
    python -m train.prune select --denoiser RUN/result/pyramid_flow_dit --data LATENTS --out CHOICE --remove 6 \\
        --decoder CKPT/causal_video_vae

  importance alone, quickly:
    python -m train.prune score --denoiser FULL --data LATENTS --out CHOICE --prompts 8 --samples 1 --steps 2 2 2 \\
        --first-steps 2 2 2

  CHOICE gets importance.json, .txt and .svg; select adds keep.json, which train.pruning reads, and with a decoder
  full.png and pruned.png, the first prompt's video with and without the removed blocks.
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        'python -m train.prune',
        description='Choose blocks of a denoiser to remove, and remove them.',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest='command', required=True)
    score = commands.add_parser('score', help='measure the importance of every block')
    select = commands.add_parser('select', help='that, and choose the blocks to remove')
    apply = commands.add_parser('apply', help='write the denoiser without some blocks')
    for command in (score, select, apply):
        command.add_argument('--denoiser', required=True, metavar='DIR', help='component folder of the full denoiser')
        command.add_argument('--out', required=True, metavar='DIR', help='folder of the result')
    apply.add_argument('--keep', required=True, metavar='LIST', help='blocks, as 0,1,2,4, or a keep.json')
    for command in (score, select):
        _add_sampling(command)
    add = select.add_argument
    add('--remove', required=True, type=int, metavar='N', help='blocks to remove')
    add('--candidates', type=int, metavar='N', help='least important blocks to choose from (default: N + 4, or all)')
    add('--check-prompts', type=int, default=8, metavar='N', help='videos to compare, one per prompt (default: 8)')
    add('--decoder', default='', metavar='DIR', help='component folder of a video VAE: compare frames, not latents')
    return parser.parse_args(argv)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add what both commands need that sample videos."""
    add = parser.add_argument
    add('--data', required=True, metavar='DIR', help='folder of train.latents or train.teacher_samples: its prompts')
    add('--prompts', type=int, default=100, metavar='N', help='different prompts (default: %(default)s)')
    add('--samples', type=int, default=5, metavar='N', help='videos of each prompt (default: %(default)s)')
    add('--steps', type=int, nargs=3, default=(10, 10, 10), metavar='N', help='steps per stage (default: 10 10 10)')
    add('--first-steps', type=int, nargs=3, default=(20, 20, 20), metavar='N', help='of unit 0 (default: 20 20 20)')
    add('--guidance', type=float, default=5.0, metavar='G', help='default: %(default)s')
    add('--first-guidance', type=float, default=7.0, metavar='G', help='of unit 0 (default: %(default)s)')
    add('--seed', type=int, default=0, help='of the noise (default: %(default)s)')
    add('--batch', type=int, default=1, metavar='N', help='videos at a time on each device (default: %(default)s)')
    add('--dtype', choices=tuple(DTYPES), default='bfloat16', help='compute type (default: %(default)s)')


def load_subject(args: argparse.Namespace) -> Subject:
    """Return the denoiser of a command line on all devices of this machine, and the prompts.

    Raises:
      InputError: the denoiser or the data cannot be read, or do not go together.
    """
    for name in ('prompts', 'samples', 'batch'):
        if getattr(args, name) < 1:
            raise InputError(f'--{name} is {getattr(args, name)}; give at least 1.')
    module, params = read_denoiser(args.denoiser)
    if module.config.num_layers < 2:
        raise InputError(f'--denoiser {args.denoiser}: has one block, which must stay; give a larger denoiser.')
    source = SampleSource(args.data)
    states = RAW_STATES if isinstance(module, TeacherMMDiT) else STATES
    if states not in source.spec.arrays:
        raise InputError(f'--data {args.data}: no {states} in it, which this denoiser reads; see train.latents --text.')
    names = (states, 'text_mask', 'pooled')
    negative = Prompt(*(jnp.asarray(source.negative()[name]) for name in names))
    check_widths(module, {'text': np.asarray(negative.text), 'pooled': np.asarray(negative.pooled)})
    samples = distinct_prompts(source, args.prompts)
    spread = Spread(jax.local_devices())
    frames, height, width, channels = source.spec.arrays['latents'].shape
    dtype = jnp.dtype(args.dtype)
    return Subject(
        module=module.clone(scan=True, dtype=dtype),
        params=spread.replicate(jax.tree.map(lambda leaf: np.asarray(leaf, dtype), params)),
        texts=[sample['prompt'] for sample in samples],
        prompts=Prompt(*(np.stack([sample[name] for sample in samples]) for name in names)),  # pyright: ignore[reportArgumentType]
        negative=negative,
        plan=Plan(frames, height, width, channels, tuple(args.steps), tuple(args.first_steps)),
        guidance=args.guidance,
        first_guidance=args.first_guidance,
        seed=args.seed,
        size=args.batch * len(spread.devices),
        spread=spread,
    )


def distinct_prompts(source: SampleSource, count: int) -> list[dict[str, Any]]:
    """Return the first samples with different prompts.

    Raises:
      InputError: there are fewer.
    """
    found: dict[str, dict[str, Any]] = {}
    for index in range(len(source)):
        sample = source[index]
        found.setdefault(sample['prompt'], sample)
        if len(found) == count:
            return list(found.values())
    raise InputError(f'--prompts {count}: the data have {len(found)} different prompts; give at most as many.')


class Record:
    """What was measured so far, in a file: a stopped run goes on from there."""

    def __init__(self, path: pathlib.Path, settings: dict[str, Any]) -> None:
        """Read or begin it.

        Raises:
          InputError: it belongs to other settings.
        """
        self._path = path
        self._content: dict[str, Any] = {'settings': settings, 'values': {}}
        if path.exists():
            self._content = json.loads(path.read_text())
            for name, value in settings.items():
                before = self._content['settings'].get(name)
                if before != value:
                    raise InputError(
                        f'{path.parent}: was begun with {name} = {json.dumps(before)}, not {json.dumps(value)}; choose '
                        'another folder, or delete it.'
                    )

    def get(self, name: str, measure: Any) -> Any:
        """Return a value, measuring it unless it is there."""
        values = self._content['values']
        if name not in values:
            values[name] = measure()
            _write(self._path, self._content)
        return values[name]


def score(args: argparse.Namespace, subject: Subject, record: Record) -> Importance:
    """Return the importance of every block, and write it."""
    tasks = [(prompt, number) for number in range(args.samples) for prompt in range(args.prompts)]
    starts = range(0, len(tasks), subject.size)
    image, text, calls = np.zeros(subject.blocks), np.zeros(subject.blocks - 1), 0
    for start in tqdm.tqdm(starts, desc='importance', unit='batch', disable=None):

        def measure(part: list[tuple[int, int]] = tasks[start : start + subject.size]) -> dict[str, Any]:
            on_image, on_text, count = subject.cosines(part)
            return {'image': on_image.tolist(), 'text': on_text.tolist(), 'calls': count}

        sums = record.get(f'videos {start}', measure)
        image, text, calls = image + sums['image'], text + sums['text'], calls + sums['calls']
    importance = Importance(1 - image / calls, 1 - text / calls)
    _write(args.out / 'importance.json', importance.to_json() | {'calls': calls, 'settings': _settings(args)})
    _write(args.out / 'importance.txt', importance.table() + '\n')
    _write(args.out / 'importance.svg', importance_svg(importance))
    print(importance.table())
    return importance


def select(args: argparse.Namespace, subject: Subject, record: Record, importance: Importance) -> tuple[int, ...]:
    """Return the blocks to keep, and write them with the rounds that chose them."""
    decode, everything = _decoder(args.decoder), tuple(range(subject.blocks))
    tasks = [(prompt, 0) for prompt in range(args.check_prompts)]
    batches = [tasks[start : start + subject.size] for start in range(0, len(tasks), subject.size)]
    draw = lambda keep: np.concatenate([decode(subject.videos(keep, batch)) for batch in batches])
    reference = draw(everything)
    trials = sum(args.candidates - done for done in range(args.remove))
    what = f'{args.decoder or "latents"} of {args.check_prompts} prompts without blocks '
    with tqdm.tqdm(total=trials, desc='selection', unit='trial', disable=None) as bar:

        def distance(keep: tuple[int, ...]) -> float:
            gone = ','.join(str(block) for block in everything if block not in keep)
            value = record.get(what + gone, lambda: difference(draw(keep), reference))
            bar.update()
            return value

        rounds = choose(importance, args.remove, args.candidates, distance)
    removed = [each.removed for each in rounds]
    keep = tuple(block for block in everything if block not in removed)
    _write(args.out / 'importance.svg', importance_svg(importance, removed))
    _write(args.out / 'keep.json', _choice(args, keep, rounds))
    if args.decoder:
        _write_sheets(args.out, {'full': reference[0], 'pruned': draw(keep)[0]})
    print('\n'.join(f'without block {each.removed}: difference {each.distance:.4f}' for each in rounds))
    print(f'keep {",".join(map(str, keep))}')
    return keep


def _choice(args: argparse.Namespace, keep: Sequence[int], rounds: Sequence[Round]) -> dict[str, Any]:
    return {
        KEEP: list(keep),
        'blocks': len(keep) + len(rounds),
        'compared': 'frames' if args.decoder else 'latents',
        'rounds': [each._asdict() for each in rounds],
        'settings': _settings(args),
    }


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the measurements depend on."""
    names = ('prompts', 'samples', 'guidance', 'first_guidance', 'seed', 'dtype')
    settings = {name: getattr(args, name) for name in names} | {'denoiser': fingerprint(args.denoiser)}
    source = {'data': str(pathlib.Path(args.data).resolve()), 'batch': args.batch * jax.local_device_count()}
    return settings | source | {'steps': list(args.steps), 'first_steps': list(args.first_steps)}


def _decoder(folder: str) -> Any:
    """Return a function from latents to frames, or without a folder to the latents themselves."""
    if not folder:
        return lambda latents: latents
    module, params = checkpoint.load(folder, CausalVAE)
    decode = jax.jit(lambda latents: module.apply({'params': params}, denormalize(latents), method='decode'))
    return lambda latents: np.concatenate([jax.device_get(decode(one[None])) for one in latents])


def _write_sheets(out: pathlib.Path, videos: dict[str, np.ndarray]) -> None:
    for name, frames in videos.items():
        video.write_contact_sheet(out / f'{name}.png', video.to_uint8(np.asarray(frames)))


def _write(path: pathlib.Path, content: Any) -> None:
    """Write text, or anything else as JSON."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2) + '\n'
    with atomic_file(path) as partial:
        partial.write_text(text)


def apply(args: argparse.Namespace) -> None:
    """Write a denoiser without the blocks that are not kept; `pruning.json` beside its weights tells which stayed.

    Raises:
      InputError: the denoiser cannot be read, or the keep list does not suit it.
    """
    keep = read_keep(args.keep)
    module, params = read_denoiser(args.denoiser)
    module, params = prune(module.clone(scan=True), params, keep)
    checkpoint.save(args.out, module, params)
    _write(args.out / 'pruning.json', {KEEP: list(keep), 'denoiser': fingerprint(args.denoiser)})
    print(f'{args.out}: {len(keep)} blocks')


def run(args: argparse.Namespace) -> None:
    """Run one of the commands.

    Raises:
      InputError: an argument or a folder is not usable.
    """
    args.out = pathlib.Path(args.out)
    if args.command == 'apply':
        apply(args)
        return
    subject = load_subject(args)
    if args.command == 'select':
        if args.candidates is None:
            args.candidates = min(args.remove + 4, subject.blocks - 1)
        check_choice(subject.blocks, args.remove, args.candidates)
        if not 1 <= args.check_prompts <= args.prompts:
            raise InputError(f'--check-prompts {args.check_prompts}: give 1 to {args.prompts}, as many as --prompts.')
    record = Record(args.out / 'record.json', _settings(args))
    importance = score(args, subject, record)
    if args.command == 'select':
        select(args, subject, record, importance)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(parse_args(argv)))


if __name__ == '__main__':
    sys.exit(main())
