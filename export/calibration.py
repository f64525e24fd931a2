"""True inputs of the denoiser graphs, recorded while the real sampler runs.

Ranges measured on noise are wrong ranges: what matters is the distribution of latents, histories and prompts that a
generation meets. The same recording holds the reference flows in float32 that exported graphs are judged by.

Legend: B batch, T latent frames, H W full-size latent grid, h w a stage's grid, C channels.
Source: arXiv 2511.06055, section 4 (300 samples per stage).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from neodragon_jax.pipeline import Components, encode_first_frame, sample_keys
from neodragon_jax.sampler import Denoiser, DrawnNoise, NoiseSource, Plan, Prompt, Unit, sample

# Used when the user gives none: one for each kind of content that changes what activations look like.
PROMPTS = (
    'a wooden sailing boat crosses a rough sea under dark clouds',
    'close-up of an old potter shaping wet clay on a spinning wheel',
    'a red fox trots through fresh snow between birch trees',
    'time lapse of city traffic at night seen from a bridge',
    'a hot air balloon drifts over green hills at sunrise',
    'two children fly a yellow kite on an empty beach',
    'macro shot of rain drops falling on a blue flower',
    'an astronaut walks slowly across a rocky orange desert',
)


class Sample(NamedTuple):
    """One denoiser call for one example, batch axis of 1 included; the arrays are on the host."""

    history: Sequence[Unit]
    x: Unit
    unit: Int[Array, ' 1']
    prompt: Prompt
    timestep: Float[Array, ' 1']
    flow: Unit


class Recorder:
    """A denoiser that behaves like the one it wraps and keeps every call.

    Attributes:
      samples: the calls of every stage, in order.
    """

    def __init__(self, denoise: Denoiser) -> None:
        self.samples: defaultdict[int, list[Sample]] = defaultdict(list)
        self._denoise = denoise

    def __call__(
        self, stage: int, history: Sequence[Unit], x: Unit, unit: Array, prompt: Prompt, timestep: Array
    ) -> Unit:
        flow = self._denoise(stage, history, x, unit, prompt, timestep)
        call = jax.device_get(Sample(list(history), x, unit, prompt, timestep, flow))
        for index in range(len(call.x)):
            self.samples[stage].append(jax.tree.map(lambda a, i=index: a[i : i + 1], call))
        return flow


class Video(NamedTuple):
    """One generation: what it started from, its denoiser calls, its latents."""

    prompt: Prompt
    negative: Prompt | None
    noise: NoiseSource
    first_frame: Unit | None
    samples: dict[int, list[Sample]]
    latents: Float[np.ndarray, '1 T H W C']

    def replay(self, denoise: Denoiser, plan: Plan) -> Float[np.ndarray, '1 T H W C']:
        """Return the latents that another denoiser generates from the same start."""
        return np.asarray(sample(denoise, plan, self.prompt, self.noise, self.negative, self.first_frame))

    @property
    def generated(self) -> slice:
        """Frames that the denoiser made: all but a given first one."""
        return slice(0 if self.first_frame is None else 1, None)


@dataclasses.dataclass(frozen=True)
class Scenes:
    """What to generate for a recording.

    Attributes:
      prompts: used in turn, modifier not included.
      modifier: appended to every prompt.
      negative_prompt: for guided plans.
      images: first frames in [-1, 1], used in turn; none lets the denoiser draw unit 0 too.
      seed: of all noise.
    """

    prompts: Sequence[str]
    modifier: str = ''
    negative_prompt: str = ''
    images: Sequence[Float[np.ndarray, 'H W 3']] = ()
    seed: int = 0

    def videos(self, components: Components, plan: Plan) -> Iterator[Video]:
        """Generate videos without end; prompts and images recur with new noise."""
        guided = plan.guidance is not None or plan.first_guidance is not None
        negative = components.encode_prompt([self.negative_prompt]) if guided else None
        for number in itertools.count():
            text = self.prompts[number % len(self.prompts)]
            prompt = components.encode_prompt([text + self.modifier])
            noise = DrawnNoise(sample_keys(self.seed, [text], [number // len(self.prompts)]), plan.schedule)
            first = None
            if self.images:
                image = jnp.asarray(self.images[number % len(self.images)])[None, None]
                first = encode_first_frame(components, image, noise)
            recorder = Recorder(components.denoise)
            latents = sample(recorder, plan, prompt, noise, negative, first)
            yield Video(prompt, negative, noise, first, dict(recorder.samples), np.asarray(latents))


class Recording(NamedTuple):
    """Calls to measure ranges on, and one video apart from them to judge the result by."""

    calibration: dict[int, list[Sample]]
    evaluation: Video


def record(
    components: Components, plan: Plan, scenes: Scenes, counts: Sequence[int], on_video: Callable[[int], None]
) -> Recording:
    """Generate videos until every stage has its number of calibration samples.

    Args:
      counts: calibration samples per stage.
      on_video: called with the number of each finished video.
    """
    videos = enumerate(scenes.videos(components, plan))
    _, evaluation = next(videos)
    on_video(0)
    calibration: dict[int, list[Sample]] = {stage: [] for stage in range(len(counts))}
    while any(len(calibration[stage]) < count for stage, count in enumerate(counts)):
        number, video = next(videos)
        for stage, samples in video.samples.items():
            calibration[stage] += samples
        on_video(number)
    return Recording({stage: spread(calibration[stage], count) for stage, count in enumerate(counts)}, evaluation)


def videos_needed(plan: Plan, counts: Sequence[int], first_frame: bool) -> int:
    """Return how many videos `record` generates, the one for evaluation included."""
    units = range(1 if first_frame else 0, plan.frames)

    def calls(stage: int) -> int:
        return sum(plan.unit_steps(unit)[stage] * (1 if plan.unit_guidance(unit) is None else 2) for unit in units)

    return 1 + max(-(-count // calls(stage)) for stage, count in enumerate(counts))


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Return `count` samples, or all if there are fewer, at even distances, so that all units are among them."""
    if count >= len(samples):
        return list(samples)
    return [samples[index] for index in np.linspace(0, len(samples) - 1, count).round().astype(int)]
