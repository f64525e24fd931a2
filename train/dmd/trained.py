"""The two trained models: the denoiser from which they start, and low-rank updates in place of all its parameters.

Student and fake model start as copies of the teacher, of the teacher with fewer blocks, or of a stored denoiser, such
as a pruned one or the result of an earlier distillation. With a rank, only low-rank updates of the linear layers are
trained, averaged and stored with their moments; `whole` adds them to the start.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.abstract import abstract_params
from neodragon_jax.checkpoint.fingerprint import fingerprint
from neodragon_jax.models.mmdit import PyramidMMDiT, stack_blocks
from train.pruning.keep_list import check_keep, prune, read_keep
from train.text.lora import LoraConfig

# Subtrees of the denoiser's parameters with an axis of blocks.
STACKED = ('blocks',)
# Folded into the key of the initial state for the low-rank updates.
STUDENT, FAKE = 1, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserLoraConfig(LoraConfig):
    """Low-rank updates of a denoiser; rank 0 trains all parameters."""

    LEAST_RANK: ClassVar[int] = 0

    rank: int = 0
    layers: str = '((image|text)_(query|key|value|out)|(image|text)_mlp/linear_[12])'

    def begin(self, key: PRNGKeyArray, start: Any) -> Any:
        """Return the trained parameters: a copy of the start in float32, or low-rank updates that do not change it."""
        if self.rank:
            return self.init(key, start, STACKED)
        # Real copies: the state's buffers are donated to every step, the start must survive.
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), start)

    def whole(self, trained: Any, start: Any) -> Any:
        """Return the parameters of the model."""
        return self.merge(start, trained) if self.rank else trained


@dataclasses.dataclass(frozen=True)
class Start:
    """The denoiser from which student and fake model start.

    Attributes:
      module: its sizes.
      keep: blocks of the teacher; () for all.
      params: of a stored denoiser, float32, stacked for the scan; None for the teacher's.
      fingerprint: of a stored denoiser, or ''.
    """

    module: PyramidMMDiT
    keep: tuple[int, ...] = ()
    params: Any = None
    fingerprint: str = ''

    def of(self, frozen: Mapping[str, Any], teacher: PyramidMMDiT) -> Any:
        """Return the parameters of the start.

        Args:
          frozen: constants of a step, with `teacher`, and `start` if it is stored apart.
        """
        if 'start' in frozen:
            return frozen['start']
        return prune(teacher, frozen['teacher'], self.keep)[1] if self.keep else frozen['teacher']

    def identity(self) -> dict[str, Any]:
        """Return the JSON that a resumed run must share."""
        return {'keep': list(self.keep), 'start': self.fingerprint}


@dataclasses.dataclass(frozen=True)
class Trained:
    """The trained parameters of student and fake model, and their whole parameters."""

    start: Start
    teacher: PyramidMMDiT
    student: DenoiserLoraConfig
    fake: DenoiserLoraConfig

    def begin(self, key: PRNGKeyArray, frozen: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the trained parameters of both models at their start."""
        start = self.start.of(frozen, self.teacher)
        student_key, fake_key = (jax.random.fold_in(key, number) for number in (STUDENT, FAKE))
        return self.student.begin(student_key, start), self.fake.begin(fake_key, start)

    def whole(self, frozen: Mapping[str, Any]) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
        """Return the functions from the trained parameters of the student and of the fake model to the whole ones."""
        start = self.start.of(frozen, self.teacher)
        return (lambda trained: self.student.whole(trained, start)), (lambda trained: self.fake.whole(trained, start))

    @functools.cached_property
    def whole_student(self) -> Callable[[Any, Mapping[str, Any]], Any]:
        """The compiled function from the student's trained parameters, and a step's constants, to the whole ones."""
        return jax.jit(lambda trained, frozen: self.whole(frozen)[0](trained))


def read_start(folder: str, keep: str, teacher: PyramidMMDiT, abstract: bool = False) -> Start:
    """Return the start that the settings name.

    Args:
      folder: of a stored denoiser; '' for the teacher.
      keep: blocks of the teacher, see `keep_list.read_keep`; '' for all.
      abstract: read the sizes alone.
    Raises:
      InputError: both are given, or one cannot be read or does not fit the teacher.
    """
    if folder and keep:
        raise InputError(f'config.dmd.start is {folder} and config.dmd.keep is {keep}; give one of them.')
    if keep:
        blocks = read_keep(keep)
        check_keep(blocks, teacher.config.num_layers)
        return Start(teacher.clone(config=dataclasses.replace(teacher.config, num_layers=len(blocks))), blocks)
    if not folder:
        return Start(teacher)
    if abstract:
        module = checkpoint.load_module(folder, PyramidMMDiT)
        params = abstract_params(module.clone(scan=True))
    else:
        module, loaded = checkpoint.load(folder, PyramidMMDiT)
        stacked = stack_blocks(loaded, module.config.num_layers)
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), stacked)
    _check_sizes(folder, module, teacher)
    return Start(module, (), params, '' if abstract else fingerprint(folder))


def _check_sizes(folder: str, module: PyramidMMDiT, teacher: PyramidMMDiT) -> None:
    """Raise InputError unless a denoiser takes the inputs of the teacher."""
    for name in ('in_channels', 'patch_size', 'caption_projection_dim', 'pooled_projection_dim'):
        got, want = getattr(module.config, name), getattr(teacher.config, name)
        if got != want:
            raise InputError(
                f'config.dmd.start {folder}: its {name} is {got}, that of the teacher {want}; give a denoiser that '
                "reads the teacher's latents and text states."
            )
