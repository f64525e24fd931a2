"""Measurements that choose the blocks to remove: importance by sampling, then trials without the least important ones.

Every measurement is recorded, so that a stopped run continues after the last videos.

Source: Neodragon, arXiv 2511.06055, section on block pruning.
Legend: L text tokens, E width of the text states, p pooled width.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neodragon_jax.base import video
from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import checked, read_json
from neodragon_jax.base.progress import ProgressBar
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.fingerprint import fingerprint
from neodragon_jax.generation.devices import Spread
from neodragon_jax.generation.options import check_seed
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.models.teacher import TeacherMMDiT
from neodragon_jax.models.vae import CausalVAE, denormalize
from neodragon_jax.pyramid.sampler import Plan, Prompt
from train.data import SampleSource
from train.data.record_spec import T5_STATES, TEXT_STATES
from train.pruning.importance import Importance
from train.pruning.importance_chart import importance_svg
from train.pruning.keep_list import KEEP
from train.pruning.selection import Round, Subject, check_choice, choose, difference
from train.teacher.denoisers import check_widths, read_denoiser


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling options of a measurement.

    Attributes:
      denoiser: component folder of the full denoiser.
      data: folder of samples, for prompts and text states.
      out: folder of the results.
      prompts: number of different prompts.
      samples: videos of each prompt.
      steps, first_steps: steps per stage, for later units and for unit 0.
      guidance, first_guidance: guidance scale of later units and of unit 0.
      batch: videos at a time on each device.
      dtype: compute type.
    """

    denoiser: pathlib.Path
    data: str
    out: pathlib.Path
    prompts: int = 100
    samples: int = 5
    steps: tuple[int, ...] = (10, 10, 10)
    first_steps: tuple[int, ...] = (20, 20, 20)
    guidance: float = 5.0
    first_guidance: float = 7.0
    seed: int = 0
    batch: int = 1
    dtype: str = 'bfloat16'

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ('prompts', 'samples', 'batch'):
            if getattr(self, name) < 1:
                raise InputError(f'--{name} is {getattr(self, name)}; give at least 1.')


@dataclasses.dataclass(frozen=True)
class Selection:
    """Options of the choice of blocks.

    Attributes:
      remove: number of blocks to remove.
      candidates: number of least important blocks to choose from; None for `remove` + 4, or all.
      check_prompts: number of videos to compare, one per prompt.
      decoder: component folder of a video VAE, to compare frames; None compares latents.
    """

    remove: int
    candidates: int | None = None
    check_prompts: int = 8
    decoder: pathlib.Path | None = None


def _text_states(sampling: Sampling, source: SampleSource, module: PyramidMMDiT | TeacherMMDiT) -> str:
    """Return the name of the array that the denoiser reads as text.

    Raises:
      InputError: the data has no such array.
    """
    states = T5_STATES if isinstance(module, TeacherMMDiT) else TEXT_STATES
    if states not in source.spec.arrays:
        raise InputError(
            f'--data {sampling.data}: no {states} in it, which this denoiser reads; see train.latents --text.'
        )
    return states


def load_subject(sampling: Sampling) -> Subject:
    """Return the denoiser on all devices of this machine, and the prompts.

    Raises:
      InputError: the denoiser or the data cannot be read, or are incompatible.
    """
    module, params = read_denoiser(sampling.denoiser)
    if module.config.num_layers < 2:
        raise InputError(f'--denoiser {sampling.denoiser}: has one block, which must stay; give a larger denoiser.')
    source = SampleSource(sampling.data)
    names = (_text_states(sampling, source, module), 'text_mask', 'pooled')
    negative = Prompt(*(jnp.asarray(source.negative()[name]) for name in names))
    check_widths(module, {'text': np.asarray(negative.text), 'pooled': np.asarray(negative.pooled)})
    samples = distinct_prompts(source, sampling.prompts)
    spread = Spread(jax.local_devices())
    frames, height, width, channels = source.spec.arrays['latents'].shape
    dtype = jnp.dtype(sampling.dtype)
    return Subject(
        module=module.clone(scan=True, dtype=dtype),
        params=spread.replicate(jax.tree.map(lambda leaf: np.asarray(leaf, dtype), params)),
        texts=[sample['prompt'] for sample in samples],
        prompts=Prompt(*(np.stack([sample[name] for sample in samples]) for name in names)),  # pyright: ignore[reportArgumentType]
        negative=negative,
        plan=Plan(frames, height, width, channels, tuple(sampling.steps), tuple(sampling.first_steps)),
        guidance=sampling.guidance,
        first_guidance=sampling.first_guidance,
        seed=sampling.seed,
        size=sampling.batch * len(spread.devices),
        spread=spread,
    )


def distinct_prompts(source: SampleSource, count: int) -> list[dict[str, Any]]:
    """Return the first samples with different prompts.

    Raises:
      InputError: there are fewer than `count`.
    """
    found: dict[str, dict[str, Any]] = {}
    for index in range(len(source)):
        sample = source[index]
        found.setdefault(sample['prompt'], sample)
        if len(found) == count:
            return list(found.values())
    raise InputError(f'--prompts {count}: the data have {len(found)} different prompts; give at most as many.')


class Record:
    """Record of the measurements so far, in a file from which a stopped run continues."""

    def __init__(self, path: pathlib.Path, settings: dict[str, Any]) -> None:
        """Read the file, or begin a new record.

        Raises:
          InputError: the file was made with other settings.
        """
        self._path = path
        self._content: dict[str, Any] = {'settings': settings, 'values': {}}
        if path.exists():
            self._content = checked(read_json(path, dict[str, Any]), dict[str, dict[str, Any]], str(path))
            for name, value in settings.items():
                before = self._content['settings'].get(name)
                if before != value:
                    raise InputError(
                        f'{path.parent}: was begun with {name} = {json.dumps(before)}, not {json.dumps(value)}; choose '
                        'another folder, or delete it.'
                    )

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return a value; measure and store it first if it is missing."""
        values = self._content['values']
        if name not in values:
            values[name] = measure()
            _write(self._path, self._content)
        return values[name]


def score(sampling: Sampling, subject: Subject, record: Record) -> Importance:
    """Measure the importance of every block, write it, and return it."""
    tasks = [(prompt, number) for number in range(sampling.samples) for prompt in range(sampling.prompts)]
    starts = range(0, len(tasks), subject.size)
    image, text, calls = np.zeros(subject.blocks), np.zeros(subject.blocks - 1), 0
    for start in ProgressBar(starts, desc='importance', unit='batch'):

        def measure(part: list[tuple[int, int]] = tasks[start : start + subject.size]) -> dict[str, Any]:
            on_image, on_text, count = subject.cosines(part)
            return {'image': on_image.tolist(), 'text': on_text.tolist(), 'calls': count}

        sums = record.get(f'videos {start}', measure)
        image, text, calls = image + sums['image'], text + sums['text'], calls + sums['calls']
    importance = Importance(1 - image / calls, 1 - text / calls)
    _write(sampling.out / 'importance.json', importance.to_json() | {'calls': calls, 'settings': _settings(sampling)})
    _write(sampling.out / 'importance.txt', importance.table() + '\n')
    _write(sampling.out / 'importance.svg', importance_svg(importance))
    print(importance.table())
    return importance


def select(
    sampling: Sampling, selection: Selection, subject: Subject, record: Record, importance: Importance
) -> tuple[int, ...]:
    """Choose the blocks to keep, write them with the rounds of the choice, and return them."""
    decode, everything = _decoder(selection.decoder), tuple(range(subject.blocks))
    tasks = [(prompt, 0) for prompt in range(selection.check_prompts)]
    batches = [tasks[start : start + subject.size] for start in range(0, len(tasks), subject.size)]
    draw = lambda keep: np.concatenate([decode(subject.videos(keep, batch)) for batch in batches])
    reference = draw(everything)
    assert selection.candidates is not None
    trials = sum(selection.candidates - done for done in range(selection.remove))
    prefix = f'{selection.decoder or "latents"} of {selection.check_prompts} prompts without blocks '
    with ProgressBar(total=trials, desc='selection', unit='trial') as bar:

        def distance(keep: tuple[int, ...]) -> float:
            gone = ','.join(str(block) for block in everything if block not in keep)
            value = record.get(prefix + gone, lambda: difference(draw(keep), reference))
            bar.update()
            return value

        rounds = choose(importance, selection.remove, selection.candidates, distance)
    removed = [each.removed for each in rounds]
    keep = tuple(block for block in everything if block not in removed)
    _write(sampling.out / 'importance.svg', importance_svg(importance, removed))
    _write(sampling.out / 'keep.json', _choice(sampling, selection, keep, rounds))
    if selection.decoder:
        _write_sheets(sampling.out, {'full': reference[0], 'pruned': draw(keep)[0]})
    print('\n'.join(f'without block {each.removed}: difference {each.distance:.4f}' for each in rounds))
    print(f'keep {",".join(map(str, keep))}')
    return keep


def _choice(sampling: Sampling, selection: Selection, keep: Sequence[int], rounds: Sequence[Round]) -> dict[str, Any]:
    return {
        KEEP: list(keep),
        'blocks': len(keep) + len(rounds),
        'compared': 'frames' if selection.decoder else 'latents',
        'rounds': [each._asdict() for each in rounds],
        'settings': _settings(sampling),
    }


def _settings(sampling: Sampling) -> dict[str, Any]:
    """Return the settings on which the measurements depend."""
    names = ('prompts', 'samples', 'guidance', 'first_guidance', 'seed', 'dtype')
    settings = {name: getattr(sampling, name) for name in names} | {'denoiser': fingerprint(sampling.denoiser)}
    source = {'data': str(pathlib.Path(sampling.data).resolve()), 'batch': sampling.batch * jax.local_device_count()}
    return settings | source | {'steps': list(sampling.steps), 'first_steps': list(sampling.first_steps)}


def _decoder(folder: pathlib.Path | None) -> Any:
    """Return the function from latents to frames, or without a folder the identity."""
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


def measure(sampling: Sampling, selection: Selection | None) -> None:
    """Measure the importance of the blocks; with a selection, also choose the blocks to keep.

    Raises:
      InputError: the denoiser or the data cannot be read, or the selection is impossible.
    """
    subject = load_subject(sampling)
    if selection is not None:
        if selection.candidates is None:
            selection = dataclasses.replace(selection, candidates=min(selection.remove + 4, subject.blocks - 1))
        check_choice(subject.blocks, selection.remove, selection.candidates)  # pyright: ignore[reportArgumentType]
        if not 1 <= selection.check_prompts <= sampling.prompts:
            raise InputError(
                f'--check-prompts {selection.check_prompts}: give 1 to {sampling.prompts}, as many as --prompts.'
            )
    record = Record(sampling.out / 'record.json', _settings(sampling))
    importance = score(sampling, subject, record)
    if selection is not None:
        select(sampling, selection, subject, record, importance)
