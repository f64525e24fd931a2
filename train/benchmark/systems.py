"""The systems that the benchmark compares: a denoiser with its text side, and how it is sampled."""

from __future__ import annotations

import dataclasses
import pathlib

from neodragon_jax.checkpoint.fingerprint import fingerprint
from neodragon_jax.checkpoint.folders import STUDENT, STUDENT_ADAPTER
from neodragon_jax.generation import defaults as generation
from neodragon_jax.generation.defaults import ModeDefaults
from train.benchmark.chain import ADAPTER, DENOISER, LANGUAGE, TEXT_ENCODER, VAE, Chain
from train.benchmark.continuation import Continuation
from train.benchmark.students import STUDENTS
from train.benchmark.whole_chain import WholeChain
from train.shapes.world import WORLDS

Steps = tuple[int, ...]
# The systems of the checkpoint that a continuation starts from.
BEFORE = 'before'


@dataclasses.dataclass(frozen=True)
class System:
    """A denoiser with its text side, and how it is sampled.

    Attributes:
      root: checkpoint with the text encoders and the VAE.
      denoiser, adapter: component folders.
      steps, first_steps: sampling steps per stage, of units > 0 and of unit 0.
      guidance: guidance scale; None for no guidance.
      spacing: levels of several steps in a stage, see `Schedule`.
    """

    root: pathlib.Path
    denoiser: pathlib.Path
    adapter: pathlib.Path
    steps: Steps
    first_steps: Steps
    guidance: float | None
    spacing: str = 'released'

    @property
    def parts(self) -> tuple[pathlib.Path, ...]:
        """The folders of everything that makes the videos."""
        return self.denoiser, self.adapter, *(self.root / name for name in (VAE, TEXT_ENCODER, *LANGUAGE))

    @property
    def is_complete(self) -> bool:
        """Whether all parts are there."""
        return all(part.is_dir() for part in self.parts)

    @property
    def weights(self) -> str:
        """An identity of all parts."""
        return ' '.join(fingerprint(part) for part in self.parts)

    @property
    def sampling(self) -> str:
        """An identity of how the denoiser is sampled."""
        return f'{self.steps} {self.first_steps} {self.guidance} {self.spacing}'


def systems(chain: Chain) -> dict[str, System]:
    """Return every system of a seed by name."""
    if isinstance(chain, Continuation):
        return _continued(chain)
    assert isinstance(chain, WholeChain), f'{chain}: no systems'
    return _trained(chain)


def _trained(chain: WholeChain) -> dict[str, System]:
    """Return the systems that a whole chain trains."""
    tier, teacher_text, distilled_text = chain.tier, chain.teacher_text, chain.distilled_text
    of = lambda name: chain.result(name) / DENOISER

    def sampled(root: pathlib.Path, denoiser: pathlib.Path, adapter: pathlib.Path, steps: Steps) -> System:
        return System(root, denoiser, adapter, steps, steps, tier.guidance)

    full = lambda root, denoiser, adapter: sampled(root, denoiser, adapter, tier.steps)
    found = {
        'teacher': full(teacher_text, teacher_text / DENOISER, teacher_text / ADAPTER),
        'text': full(distilled_text, distilled_text / DENOISER, distilled_text / ADAPTER),
        'teacher_1': sampled(distilled_text, distilled_text / DENOISER, distilled_text / ADAPTER, (1, 1, 1)),
    }
    if tier.ablations:
        found |= {
            'text_without_cosine': full(
                chain.without_cosine, teacher_text / DENOISER, chain.result('text_without_cosine') / ADAPTER
            ),
            'pruned_stage1': full(teacher_text, of('stage1'), teacher_text / ADAPTER),
            'pruned': full(teacher_text, of('stage2'), teacher_text / ADAPTER),
            'pruned_stage2_alone': full(teacher_text, of('stage2_alone'), teacher_text / ADAPTER),
        }
    return found | _students(chain)


def _continued(chain: Continuation) -> dict[str, System]:
    """Return the systems of a continuation and, where captions say the same, those of its checkpoint."""
    root, tier = chain.distilled_text, chain.tier
    teacher = System(root, root / DENOISER, root / ADAPTER, tier.steps, tier.steps, tier.guidance)
    found = {}
    if tier.further and not WORLDS[tier.world].omitted:
        found[f'{BEFORE}_teacher'] = dataclasses.replace(teacher, root=chain.start, denoiser=chain.start / DENOISER)
    if (chain.start / STUDENT).is_dir() and not WORLDS[tier.world].omitted:
        found[BEFORE] = _student_of(chain.start)
    single = dataclasses.replace(teacher, steps=(1, 1, 1), first_steps=(1, 1, 1))
    return found | {'teacher': teacher, 'teacher_1': single} | _students(chain)


def _student_of(root: pathlib.Path) -> System:
    """Return the student of a checkpoint, sampled as its generation.json says."""
    mode: ModeDefaults = generation.read(root).hybrid
    sampling = mode.steps, mode.first_steps, mode.guidance, mode.spacing
    return System(root, root / STUDENT, root / STUDENT_ADAPTER, *sampling)


def _students(chain: Chain) -> dict[str, System]:
    """Return the students of a chain."""
    found = {}
    for name in chain.students:
        result, student = chain.result(name), STUDENTS[name]
        folders = chain.distilled_text, result / STUDENT, result / STUDENT_ADAPTER
        found[name] = System(*folders, student.steps, student.first_steps, None, spacing='even')
    return found
