"""The multi-step teacher on all devices of a process, which samples videos of prompts as latents.

Legend: B batch, T latent frames, H W latent grid, C channels, L text tokens, D width.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from neodragon_jax.base.bucket import StoragePath
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.files import file_sha256
from neodragon_jax.checkpoint import folders
from neodragon_jax.checkpoint.components import component_folder
from neodragon_jax.checkpoint.fingerprint import fingerprint
from neodragon_jax.checkpoint.results import DenoiserFolders, find_teacher
from neodragon_jax.evaluation.prompt_files import read_prompts
from neodragon_jax.generation import defaults as generation
from neodragon_jax.generation import first_frame, pipeline
from neodragon_jax.generation.options import VideoOptions, check_seed
from neodragon_jax.generation.plan import VideoSettings, video_settings
from neodragon_jax.pyramid.sampler import DrawnNoise, Plan, Prompt, sample
from train.data.first_frames import pair_pictures
from train.flow.first_frames import (
    DRAWN,
    GENERATED,
    PICTURES,
    SOURCES,
    FirstFrames,
    drawn_frames,
    first_frame_model,
    given_frames,
)
from train.flow.guidance import scale_by_unit
from train.flow.guided_teacher import GuidedTeacher
from train.flow.stage_starts import StartRecorder, Starts
from train.runtime.platform import attention_on_platform
from train.runtime.sharded_store import ShardedStore
from train.runtime.sharding import MeshConfig, batch_groups, batch_sharding, make_mesh, replicated

MODE = 'monolithic'  # of generation.json
# Components, besides denoiser, adapter and first-frame model, on which the samples depend.
ENCODERS = (folders.CLIP_L, folders.CLIP_G, folders.T5, *folders.TOKENIZERS, folders.VIDEO_VAE)


@dataclasses.dataclass(frozen=True)
class TeacherSamplesOptions:
    """Options of `train.teacher_samples`; see its --help for each.

    Attributes:
      teacher: result of a training run; None takes the checkpoint's multi-step denoiser.
      first_frame: GENERATED, DRAWN, or pictures of unit 0; None takes the checkpoint's own source.
      video: choices that override generation.json.
    """

    checkpoint: StoragePath | str
    teacher: StoragePath | None
    prompts_file: StoragePath
    out: StoragePath
    count: int
    first_frame: pathlib.Path | str | None
    video: VideoOptions
    seed: int
    batch: int
    samples_per_shard: int
    dtype: str
    store_dtype: str
    store_starts: bool
    attention: str
    fsdp: int
    tensor: int
    distributed: bool
    start_timeout_s: float

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ('count', 'batch', 'samples_per_shard'):
            if getattr(self, name) < 1:
                raise InputError(f'--{name.replace("_", "-")} is {getattr(self, name)}; give at least 1.')


@dataclasses.dataclass(frozen=True)
class Request:
    """The samples that a command line asks for, before any weights are read.

    Attributes:
      settings: with the choices of generation.json.
      first_frame: source of unit 0: GENERATED, DRAWN or PICTURES.
      pictures: first frames, one per prompt; None for other sources.
      folders: the denoiser and its adapter.
    """

    options: TeacherSamplesOptions
    settings: VideoSettings
    prompts: list[str]
    first_frame: str
    pictures: list[pathlib.Path] | None
    folders: DenoiserFolders

    @property
    def guidance(self) -> tuple[float, float]:
        """Guidance scales of units > 0 and of unit 0; 1 is no guidance."""
        plan = self.settings.plan
        scales = (plan.guidance, plan.first_guidance)
        return tuple(1.0 if scale is None else scale for scale in scales)  # pyright: ignore[reportReturnType]

    def protocol(self) -> dict[str, Any]:
        """Return the settings of the samples; a resumed run and any training on the samples must have the same."""
        settings, options = self.settings, self.options
        frames, height, width = settings.size
        guidance, first_guidance = self.guidance
        record = {'frames': frames, 'height': height, 'width': width}
        record |= {'steps': settings.plan.steps, 'first_steps': settings.plan.first_steps}
        record |= {'guidance': guidance, 'first_guidance': first_guidance}
        record |= {'prompt_modifier': settings.modifier, 'negative_prompt': settings.negative}
        record |= {'seed': options.seed, 'dtype': options.dtype}
        record |= {'first_frame': self.first_frame}
        if self.pictures is not None:
            digests = ''.join(file_sha256(path) for path in self.pictures)
            record |= {'pictures': hashlib.sha256(digests.encode()).hexdigest()[:16]}
        if self.first_frame == DRAWN:
            record |= {'first_frame_model': fingerprint(first_frame_model(options.checkpoint))}
        encoders = {name: fingerprint(component_folder(options.checkpoint, name)) for name in ENCODERS}
        return record | {
            'spacing': settings.plan.schedule.spacing,
            'encoders': encoders,
            'prompt_count': len(self.prompts),
            'prompts': hashlib.sha256('\n'.join(self.prompts).encode()).hexdigest()[:16],
            'teacher': fingerprint(self.folders.denoiser),
            'adapter': fingerprint(self.folders.adapter),
        }


def make_request(options: TeacherSamplesOptions) -> Request:
    """Read the small inputs of a command line.

    Raises:
      InputError: the prompts, the pictures, generation.json or a choice is not usable.
    """
    prompts, defaults = read_prompts(options.prompts_file), generation.read(options.checkpoint)
    # Before the models, which may be downloaded.
    settings = video_settings(options.video, MODE, defaults)
    source, pictures = options.first_frame or SOURCES[defaults.of('hybrid').first_frame], None
    if isinstance(source, pathlib.Path):
        source, pictures = PICTURES, pair_pictures(source, prompts, '--first-frame', (DRAWN, GENERATED))
    elif source == DRAWN:
        first_frame_model(options.checkpoint)
    folders = find_teacher(options.checkpoint, options.teacher, '--teacher')
    return Request(options, settings, prompts, source, pictures, folders)


@dataclasses.dataclass(frozen=True)
class TeacherSampler:
    """The multi-step system on all devices of this process.

    Attributes:
      teacher: the denoiser with guidance.
      plan: sampling plan, without guidance.
      negative: conditioning of the negative prompt: text [L, D], mask [L], pooled [p].
      first_frames: source of unit 0; None lets the teacher generate it.
    """

    components: pipeline.Components
    teacher: GuidedTeacher
    plan: Plan
    negative: Prompt
    mesh: Mesh
    request: Request
    first_frames: FirstFrames | None

    def draw(self, indices: Sequence[int]) -> tuple[Prompt, Float[Array, 'B T H W C'], Starts]:
        """Return conditioning, latents and starts of some samples, which depend on their indices and the seed only.

        The starts are {} unless they are stored.
        """
        request, count = self.request, len(self.request.prompts)
        prompts, numbers = [request.prompts[index % count] for index in indices], [index // count for index in indices]
        texts = [text + request.settings.modifier for text in prompts]
        prompt = self.shard(self.components.encode_prompt(texts))
        keys = pipeline.sample_keys(request.options.seed, prompts, numbers)
        noise, first = DrawnNoise(self.shard(keys)), None
        if self.first_frames is not None:
            frames = self.first_frames([index % count for index in indices], texts, keys)
            first = pipeline.encode_first_frame(self.components, self.shard(frames), noise)
        denoise = StartRecorder(self.teacher.denoiser(0 if first is None else 1))
        latents = sample(denoise, self.plan, prompt, noise, first_frame=first)
        return prompt, latents, denoise.starts(self.plan.frames) if request.options.store_starts else {}

    def shard(self, tree: Any) -> Any:
        """Split a tree along its leading axis, whose length is a multiple of `groups`."""
        return jax.device_put(tree, batch_sharding(self.mesh))

    @property
    def groups(self) -> int:
        """Parts of a batch."""
        return batch_groups(self.mesh)


def load_teacher(request: Request) -> TeacherSampler:
    """Load the teacher.

    Raises:
      InputError: the checkpoint is damaged, or the size does not fit it.
    """
    options, settings = request.options, request.settings
    plan = dataclasses.replace(settings.plan, guidance=None, first_guidance=None)
    mesh = make_mesh(MeshConfig(-1, options.fsdp, options.tensor), jax.local_devices())
    copy, dtype = functools.partial(jax.device_put, device=replicated(mesh)), jnp.dtype(options.dtype)
    store = ShardedStore(copy, mesh=mesh, split=pipeline.DENOISER)
    components = pipeline.load(options.checkpoint, MODE, *request.folders, dtype=dtype, place=copy, store=store)
    plan = components.check(plan)
    negative = jax.tree.map(lambda leaf: leaf[0], components.encode_prompt([settings.negative]))
    module, params = pipeline.load_denoiser(request.folders.denoiser, dtype, store)
    module = module.clone(attention=attention_on_platform(options.attention))
    teacher = GuidedTeacher(module, params, negative, scale_by_unit(*request.guidance), plan, mesh)
    size, first_frames = settings.size[1:], None
    if request.pictures is not None:
        first_frames = given_frames(request.pictures, size)
    elif request.first_frame == DRAWN:
        model = first_frame.load(options.checkpoint, *first_frame.picture_size(*size), dtype, copy, store)
        first_frames = drawn_frames(model, size, mesh)
    return TeacherSampler(components, teacher, plan, negative, mesh, request, first_frames)
