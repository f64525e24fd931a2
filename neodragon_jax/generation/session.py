"""A loaded checkpoint, ready to make videos: what the command line holds between its options and its files."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from neodragon_jax.base import video
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders, shipped
from neodragon_jax.checkpoint.params import read_params
from neodragon_jax.generation import defaults as generation
from neodragon_jax.generation import first_frame, pipeline, safety
from neodragon_jax.generation.consistency_sampler import TIMESTEPS, DrawnPictureNoise
from neodragon_jax.generation.devices import Spread
from neodragon_jax.generation.param_store import Store
from neodragon_jax.generation.phases import Task, in_step
from neodragon_jax.generation.plan import make_plan
from neodragon_jax.generation.profile import UPSCALER, Profile
from neodragon_jax.models.super_resolution import QuickSRNet, upscale
from neodragon_jax.pyramid.sampler import DrawnNoise, Keys, Plan

Frames = Float[np.ndarray, 'B 1 H W 3']

# What is told of progress: called after every step with the name of its phase.
OnStep = Callable[[str], object]

# Makes the first frames of a batch as a task, from prompts with modifier and keys.
FirstFrames = Callable[[Sequence[str], Keys, OnStep], Task[Frames]]

# The released first-frame model draws at twice the video's size.
PICTURE_SCALE = 2
# Batches that share one loading of each module with --low-memory. Their frames wait in memory for the last phase.
BATCHES_PER_LOADING = 16
# Seconds that a process waits at its end for the others, which may have longer videos to make.
SHUTDOWN_TIMEOUT = 24 * 3600


class Clip(NamedTuple):
    """A finished video."""

    frames: UInt8[np.ndarray, 'F _ _ 3']
    refused: bool  # by the safety checker: all frames, or the first frame it grew from, were made black


@dataclasses.dataclass(frozen=True)
class Studio:
    """Makes batches of videos.

    Attributes:
      components: the modules.
      plan: what to generate and how.
      spread: the devices; a full batch has one video for each.
      store: the parameters.
      upscale: frames [..., H, W, 3] to larger ones; None leaves the decoder's size.
      first_frames: the source of first frames in [-1, 1]; None generates all frames.
      first_frame_steps: steps that this source takes.
      checker: judges first frames and videos; None lets all pass.
      profile: measurements; None takes none.
      modifier: appended to every prompt.
      negative: what guidance steers away from.
      seed: of all videos.
    """

    components: pipeline.Components
    plan: Plan
    spread: Spread
    store: Store
    upscale: Callable[[np.ndarray], np.ndarray] | None
    first_frames: FirstFrames | None
    first_frame_steps: int
    checker: safety.SafetyChecker | None
    profile: Profile | None
    modifier: str
    negative: str
    seed: int

    @classmethod
    def open(cls, args: argparse.Namespace, videos: int) -> Studio:
        """Load what a command line asks for, on as many devices as there are videos.

        Raises:
          InputError: an option does not fit the checkpoint, or a file is missing or damaged.
        """
        args, defaults = _settled(args)
        size = (args.height, args.width)
        steps, guidance = (args.steps, args.first_steps), (args.guidance, args.first_guidance)
        plan = make_plan(args.mode, args.frames, *size, *steps, *guidance, defaults)
        picture = None if args.image is None else video.image_to_frame(video.read_image(args.image), *size)
        spread = Spread(jax.local_devices()[:videos])
        store = Store(spread.replicate, one_at_a_time=args.low_memory)
        profile = Profile() if args.profile else None
        dtype = jnp.dtype(args.dtype)
        student = pathlib.Path(args.student) if args.student else None
        components = pipeline.load(
            args.checkpoint,
            args.mode,
            denoiser=student and student / folders.DENOISER_FOLDERS['hybrid'],
            adapter=student and student / folders.ADAPTER_FOLDERS['hybrid'],
            dtype=dtype,
            store=store,
        )
        return cls(
            components=profile.components(components) if profile else components,
            plan=components.check(plan),
            spread=spread,
            store=store,
            upscale=None if args.upscale is None else _upscaler(args.upscale, dtype, store, profile),
            first_frames=_first_frames(args, picture, spread, store, profile),
            first_frame_steps=len(TIMESTEPS) if picture is None and args.first_frame == 'model' else 0,
            checker=_checker(args, spread, store, profile),
            profile=profile,
            modifier=args.prompt_modifier,
            negative=args.negative_prompt,
            seed=args.seed,
        )

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width in pixels of what is decoded."""
        plan, side = self.plan, generation.SPATIAL_FACTOR
        return 1 + generation.TEMPORAL_FACTOR * (plan.frames - 1), side * plan.height, side * plan.width

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
        """Steps of progress per batch: of the first frame, of denoising, and of decoding, latent frame by frame."""
        return self.first_frame_steps + self.plan.steps_total(self.first_unit) + self.plan.frames

    @property
    def videos_at_once(self) -> int:
        """How many videos are best made by one call of `make`: a batch, or as many as share a loading."""
        return len(self.spread.devices) * (BATCHES_PER_LOADING if self.store.one_at_a_time else 1)

    def make(
        self, prompts: Sequence[str], numbers: Sequence[int], on_step: OnStep = lambda phase: None
    ) -> Iterator[Clip]:
        """Make videos, one per device at a time; with one module at a time in memory, phase by phase for all of them.

        Args:
          prompts: without modifier.
          numbers: sample number of each video among those of its prompt.
          on_step: called after each of `steps` with the name of its phase.
        """
        size = len(self.spread.devices)
        starts = range(0, len(prompts), size)
        tasks = [self._batch(prompts[i : i + size], numbers[i : i + size], on_step) for i in starts]
        for clips, refused in in_step(tasks):
            clips = clips if self.upscale is None else self.upscale(clips)
            yield from (Clip(frames, bool(black)) for frames, black in zip(clips, refused, strict=True))

    def _batch(
        self, prompts: Sequence[str], numbers: Sequence[int], on_step: OnStep
    ) -> Task[tuple[np.ndarray, np.ndarray]]:
        """Make the videos of a batch, and tell which were refused; a short batch is filled up meanwhile."""
        missing = len(self.spread.devices) - len(prompts)
        texts = [*prompts, *[prompts[-1]] * missing]
        keys = self.spread.shard(pipeline.sample_keys(self.seed, texts, [*numbers, *[numbers[-1]] * missing]))
        texts = [text + self.modifier for text in texts]
        frames, refused = None, np.zeros(len(texts), bool)
        if self.first_frames is not None:
            frames = yield from self.first_frames(texts, keys, on_step)
            if self.checker is not None:
                yield frames
                frames, refused = self.checker.frames(frames)
            yield frames
        clips = yield from pipeline.generation(
            self.components,
            self.plan,
            texts,
            DrawnNoise(keys),
            self.negative,
            frames,
            on_step=lambda *arguments: _reached('denoising', on_step, arguments[-1]),
            shard=self.spread.shard,
            on_decoded=lambda index: on_step('decoding'),
        )
        if self.checker is not None:
            yield clips
            clips, also_refused = self.checker.videos(clips)
            refused = refused | also_refused
        return clips[: len(prompts)], refused[: len(prompts)]


def _settled(args: argparse.Namespace) -> tuple[argparse.Namespace, generation.ModeDefaults]:
    """Return a command line with all choices made: by its options, else by the checkpoint's generation.json.

    The numbers of steps and the guidance are left as they are; they go over the defaults of the mode, returned too.
    """
    root = shipped.find(args.checkpoint)
    defaults = generation.read(root)
    if args.checkpoint is None:
        about = f', trained on {defaults.prompts}' if defaults.prompts else ''
        print(f'Using the shipped checkpoint {root.name}{about}. --checkpoint takes another.')
    names = ('mode', 'frames', 'height', 'width', 'prompt_modifier', 'negative_prompt')
    chosen = {name: getattr(defaults if getattr(args, name) is None else args, name) for name in names}
    mode = defaults.of(chosen['mode'])
    if args.image is not None and args.first_frame is not None:
        raise InputError(f'--image {args.image} is the first frame, and so is --first-frame; leave one of them out.')
    first_frame = generation.choose_first_frame(args.first_frame, chosen['mode'], defaults)
    chosen |= {'checkpoint': root, 'first_frame': first_frame}
    return argparse.Namespace(**vars(args) | chosen), mode


def _reached(phase: str, on_step: OnStep, x: Any) -> None:
    """Report a step when its result is there, not when it is only asked for: a bar that runs ahead is of no use."""
    jax.block_until_ready(x)
    on_step(phase)


def start_processes() -> tuple[int, int]:
    """Join the other processes of this run; return this one's index and their number.

    Processes on a TPU pod, under Slurm or under Open MPI find each other. Elsewhere JAX_COORDINATOR_ADDRESS
    (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID say it.

    Raises:
      InputError: the processes cannot find each other with what is given.
    """
    given: dict[str, Any] = {}
    try:
        if 'JAX_COORDINATOR_ADDRESS' in os.environ:
            given['num_processes'] = int(os.environ['JAX_NUM_PROCESSES'])
            given['process_id'] = int(os.environ['JAX_PROCESS_ID'])
        jax.distributed.initialize(**given, shutdown_timeout_seconds=SHUTDOWN_TIMEOUT)
    except (KeyError, ValueError) as error:
        raise InputError(
            f'--distributed, but JAX recognizes no cluster here ({error}): set JAX_COORDINATOR_ADDRESS, '
            'JAX_NUM_PROCESSES and JAX_PROCESS_ID, or leave the option out.'
        ) from None
    return jax.process_index(), jax.process_count()


def _upscaler(folder: str, dtype: Any, store: Store, profile: Profile | None) -> Callable[[np.ndarray], np.ndarray]:
    """Return a compiled super-resolution network as a function of frames."""
    module = checkpoint.load_module(folder)
    if not isinstance(module, QuickSRNet):
        raise InputError(f'{folder}: holds a {type(module).__name__}; pass the folder of a QuickSRNet.')
    # It runs between two batches of the decoder and is tiny: it stays, on one device.
    own = Store(lambda leaf: jax.device_put(leaf, jax.local_devices()[0]))
    params = own.hold(UPSCALER, lambda: read_params(folder, dtype))
    store.sizes.update(own.sizes)
    module = module.clone(dtype=dtype)
    apply = jax.jit(lambda params, frames: module.apply({'params': params}, frames))
    enlarge = lambda frames: apply(params(), frames)
    measured = profile.timed(enlarge, UPSCALER) if profile else enlarge
    return lambda frames: upscale(measured, frames)


def _first_frames(
    args: argparse.Namespace,
    picture: Float[np.ndarray, 'H W 3'] | None,
    spread: Spread,
    store: Store,
    profile: Profile | None,
) -> FirstFrames | None:
    """Return the source of first frames: the given picture, the first-frame model, or none for the denoiser.

    Raises:
      InputError: the first-frame model is asked for and not there, or does not fit.
    """
    if picture is not None:

        def show(prompts: Sequence[str], keys: Keys, on_step: OnStep) -> Task[Frames]:
            yield from ()  # no phase of its own
            return np.broadcast_to(picture, (len(prompts), 1, *picture.shape))

        return show
    if args.first_frame == 'denoiser':
        return None
    if not (args.checkpoint / folders.FIRST_FRAME_UNET).is_dir():
        raise InputError(
            f'{args.checkpoint}: no first-frame model ({folders.FIRST_FRAME_UNET}) in it. Let the denoiser make '
            'frame 0, too, with --first-frame denoiser, or give a picture with --image.'
        )
    size = (PICTURE_SCALE * args.height, PICTURE_SCALE * args.width)
    model = first_frame.load(args.checkpoint, *size, dtype=jnp.dtype(args.dtype), store=store)
    model = profile.first_frame(model) if profile else model

    def draw(prompts: Sequence[str], keys: Keys, on_step: OnStep) -> Task[Frames]:
        report = lambda number, latents: _reached('first frame', on_step, latents)
        pictures = yield from model.drawing(prompts, DrawnPictureNoise(keys), spread.shard, report)
        return first_frame.to_frames(pictures, args.height, args.width)

    return draw


def _checker(
    args: argparse.Namespace, spread: Spread, store: Store, profile: Profile | None
) -> safety.SafetyChecker | None:
    """Return the checkpoint's safety checker, or none, and say so unless that is what the user asked for."""
    if args.no_safety_checker:
        return None
    checker = safety.load(args.checkpoint, store, spread.shard)
    if checker is None:
        print(f'No {folders.SAFETY_CHECKER} in {args.checkpoint}: videos are not checked for unsafe content.')
        return None
    if profile is None:
        return checker
    return dataclasses.replace(checker, judge=profile.timed(checker.judge, safety.SAFETY_CHECKER))
