"""A checkpoint in memory: its modules as compiled functions on the devices of this process."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.files import is_there
from neodragon_jax.base.paths import input_path
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders, hub, shipped
from neodragon_jax.checkpoint.params import read_params
from neodragon_jax.generation import defaults, first_frame, pipeline, safety
from neodragon_jax.generation.devices import Spread
from neodragon_jax.generation.options import ModelOptions
from neodragon_jax.generation.param_store import Store
from neodragon_jax.generation.profile import UPSCALER, Profile
from neodragon_jax.generation.student import find_student, with_student
from neodragon_jax.models.super_resolution import QuickSRNet, upscale


@dataclasses.dataclass(frozen=True)
class LoadedCheckpoint:
    """The modules of a checkpoint, ready to run.

    Attributes:
      root: folder of the checkpoint.
      mode: one of `defaults.MODES`.
      defaults: values of its generation.json.
      dtype: compute type.
      components: the pipeline's modules.
      spread: the devices; a full batch has one video for each.
      store: the parameters.
      upscale: frames [..., H, W, 3] to larger ones; None keeps their size.
      checker: safety checker of first frames and videos; None accepts all.
      profile: measurements; None disables them.
    """

    root: pathlib.Path
    mode: str
    defaults: defaults.GenerationDefaults
    dtype: Any
    components: pipeline.Components
    spread: Spread
    store: Store
    upscale: Callable[[np.ndarray], np.ndarray] | None
    checker: safety.SafetyChecker | None
    profile: Profile | None
    _first_frame_models: dict[tuple[int, int], first_frame.FirstFrameModel] = dataclasses.field(
        default_factory=dict, repr=False
    )

    def first_frame_model(self, height: int, width: int) -> first_frame.FirstFrameModel:
        """Return the first-frame model for videos of height x width pixels; each size is compiled once.

        Raises:
          InputError: the checkpoint has no such model, or the size does not fit it.
        """
        if not is_there(self.root / folders.FIRST_FRAME_UNET):
            raise InputError(
                f'{self.root}: no first-frame model ({folders.FIRST_FRAME_UNET}) in it. Let the denoiser make frame 0, '
                'too, with --first-frame denoiser, or give a picture with --image.'
            )
        if (height, width) not in self._first_frame_models:
            size = first_frame.picture_size(height, width)
            model = first_frame.load(self.root, *size, dtype=self.dtype, store=self.store)
            self._first_frame_models[height, width] = self.profile.first_frame(model) if self.profile else model
        return self._first_frame_models[height, width]


def load_checkpoint(options: ModelOptions, devices: Sequence[Any]) -> LoadedCheckpoint:
    """Load a checkpoint and place its parameters on every device.

    Raises:
      InputError: there is no such checkpoint, an option does not fit it, or a file is missing or damaged.
    """
    values = defaults.read(options.checkpoint)
    mode = options.mode or values.mode
    root = shipped.find(options.checkpoint, hub.needed_folders(mode, values.of(mode).first_frame))
    spread, dtype = Spread(devices), jnp.dtype(options.dtype)
    store = Store(spread.replicate, one_at_a_time=options.low_memory)
    profile = Profile() if options.profile else None
    student = None if options.student is None else find_student(options.student, mode)
    values = with_student(values, student) if student else values
    components = pipeline.load(
        root,
        mode,
        denoiser=student and student / folders.STUDENT,
        adapter=student and student / folders.STUDENT_ADAPTER,
        dtype=dtype,
        store=store,
    )
    return LoadedCheckpoint(
        root=root,
        mode=mode,
        defaults=values,
        dtype=dtype,
        components=profile.components(components) if profile else components,
        spread=spread,
        store=store,
        upscale=None if options.upscale is None else _upscaler(options.upscale, dtype, store, profile),
        checker=_checker(root, spread, store, profile) if options.safety_checker else None,
        profile=profile,
    )


def _upscaler(
    folder: str | os.PathLike[str], dtype: Any, store: Store, profile: Profile | None
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a compiled super-resolution network as a function of frames."""
    folder = input_path(folder, '--upscale')
    module = checkpoint.load_module(folder, QuickSRNet)
    # The network is tiny and runs between two batches of the decoder, so it stays loaded on one device.
    own_store = Store(lambda leaf: jax.device_put(leaf, jax.local_devices()[0]))
    params = own_store.hold(UPSCALER, lambda: read_params(folder, dtype))
    store.sizes.update(own_store.sizes)
    module = module.clone(dtype=dtype)
    apply = jax.jit(lambda params, frames: module.apply({'params': params}, frames))
    enlarge = lambda frames: apply(params(), frames)
    measured = profile.timed(enlarge, UPSCALER) if profile else enlarge
    return lambda frames: upscale(measured, frames)


def _checker(root: pathlib.Path, spread: Spread, store: Store, profile: Profile | None) -> safety.SafetyChecker | None:
    """Return the checkpoint's safety checker; None if it has none."""
    checker = safety.load(root, store, spread.shard)
    if checker is None or profile is None:
        return checker
    return dataclasses.replace(checker, classify=profile.timed(checker.classify, safety.SAFETY_CHECKER))
