"""A loaded checkpoint, ready to make videos: what the command line holds between its options and its files."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from neodragon_jax import checkpoint, first_frame, pipeline, video
from neodragon_jax.errors import InputError
from neodragon_jax.models.super_resolution import QuickSRNet, upscale
from neodragon_jax.sampler import DrawnNoise, Keys, Plan
from neodragon_jax.tokens import DEFAULT_MODIFIER, DEFAULT_NEGATIVE_PROMPT

Frames = Float[np.ndarray, 'B 1 H W 3']

# The released first-frame model draws at twice the video's size.
PICTURE_SCALE = 2


@dataclasses.dataclass(frozen=True)
class Studio:
    """Makes batches of videos.

    Attributes:
      components: the modules.
      plan: what to generate and how.
      spread: the devices; a full batch has one video for each.
      upscale: frames [..., H, W, 3] to larger ones; None leaves the decoder's size.
      first_frames: (prompts with modifier, keys) -> first frames in [-1, 1]; None generates all frames.
      modifier: appended to every prompt.
      negative: what guidance steers away from.
      seed: of all videos.
    """

    components: pipeline.Components
    plan: Plan
    spread: pipeline.Spread
    upscale: Callable[[np.ndarray], np.ndarray] | None
    first_frames: Callable[[Sequence[str], Keys], Frames] | None
    modifier: str
    negative: str
    seed: int

    @classmethod
    def open(cls, args: argparse.Namespace, videos: int) -> Studio:
        """Load what a command line asks for, on as many devices as there are videos.

        Raises:
          InputError: an option does not fit the checkpoint, or a file is missing or damaged.
        """
        size = (args.height, args.width)
        steps = (args.steps, args.first_steps)
        plan = pipeline.make_plan(args.mode, args.frames, *size, *steps, args.guidance, args.first_guidance)
        picture = None if args.image is None else video.image_to_frame(video.read_image(args.image), *size)
        spread = pipeline.Spread(jax.local_devices()[:videos])
        student = pathlib.Path(args.student) if args.student else None
        components = pipeline.load(
            args.checkpoint,
            args.mode,
            denoiser=student and student / pipeline.DENOISER_FOLDERS['hybrid'],
            adapter=student and student / pipeline.ADAPTER_FOLDERS['hybrid'],
            dtype=jnp.dtype(args.dtype),
            place=spread.replicate,
        )
        return cls(
            components=components,
            plan=components.check(plan),
            spread=spread,
            upscale=None if args.upscale is None else _upscaler(args.upscale),
            first_frames=_first_frames(args, picture, spread),
            modifier=DEFAULT_MODIFIER if args.prompt_modifier is None else args.prompt_modifier,
            negative=DEFAULT_NEGATIVE_PROMPT if args.negative_prompt is None else args.negative_prompt,
            seed=args.seed,
        )

    @property
    def first_unit(self) -> int:
        """The first unit that the denoiser generates."""
        return 0 if self.first_frames is None else 1

    @property
    def calls(self) -> int:
        """Denoiser evaluations per video."""
        return self.plan.calls(self.first_unit)

    @property
    def steps(self) -> int:
        """Denoising steps per batch."""
        return self.plan.steps_total(self.first_unit)

    def make(
        self, prompts: Sequence[str], numbers: Sequence[int], on_step: Callable[[], object]
    ) -> UInt8[np.ndarray, 'b F _ _ 3']:
        """Return the videos of a batch; one that is shorter than the number of devices is filled up meanwhile.

        Args:
          prompts: without modifier.
          numbers: sample number of each video among those of its prompt.
          on_step: called after every denoising step.
        """
        missing = len(self.spread.devices) - len(prompts)
        texts = [*prompts, *[prompts[-1]] * missing]
        keys = self.spread.shard(pipeline.sample_keys(self.seed, texts, [*numbers, *[numbers[-1]] * missing]))
        texts = [text + self.modifier for text in texts]
        clips = pipeline.generate(
            self.components,
            self.plan,
            texts,
            DrawnNoise(keys),
            self.negative,
            None if self.first_frames is None else self.first_frames(texts, keys),
            on_step=lambda *_: on_step(),
            shard=self.spread.shard,
        )
        clips = clips[: len(prompts)]
        return clips if self.upscale is None else self.upscale(clips)


def _upscaler(folder: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return a compiled super-resolution network as a function of frames."""
    module, params = checkpoint.load(folder)
    if not isinstance(module, QuickSRNet):
        raise InputError(f'{folder}: holds a {type(module).__name__}; pass the folder of a QuickSRNet.')
    apply = jax.jit(lambda frames: module.apply({'params': params}, frames))
    return lambda frames: upscale(apply, frames)


def _first_frames(
    args: argparse.Namespace, picture: Float[np.ndarray, 'H W 3'] | None, spread: pipeline.Spread
) -> Callable[[Sequence[str], Keys], Frames] | None:
    """Return the source of first frames: the given picture, the first-frame model in hybrid mode, else none."""
    if picture is not None:
        return lambda prompts, keys: np.broadcast_to(picture, (len(prompts), 1, *picture.shape))
    if args.mode != 'hybrid':
        return None
    size = (PICTURE_SCALE * args.height, PICTURE_SCALE * args.width)
    model = first_frame.load(args.checkpoint, *size, dtype=jnp.dtype(args.dtype), place=spread.replicate)

    def draw(prompts: Sequence[str], keys: Keys) -> Frames:
        pictures = model(prompts, first_frame.DrawnPictureNoise(keys), spread.shard)
        return first_frame.to_frames(pictures, args.height, args.width)

    return draw
