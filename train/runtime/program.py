"""Interface between the training loop and a program: state, methods, and settings of a run."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Hashable, Mapping
from typing import Any, Protocol

from jaxtyping import Array, PRNGKeyArray

from neodragon_jax.base.bucket import StoragePath
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.paths import storage_path
from neodragon_jax.base.roll_call import LONGEST_TIMEOUT_S, START_TIMEOUT_S
from train.runtime.settings import check_range, top_level
from train.runtime.sharding import MeshConfig

Metrics = dict[str, Array]

# Prefix of the metrics of an evaluation in the logs and in `LoopConfig.best_metric`: eval/NAME.
EVALUATION = 'eval/'


class DivergedError(RuntimeError):
    """Error of a run that goes wrong: its steps are not finite, or its evaluation says so. Nothing of it is lost.

    Attributes:
      metrics: those of the evaluation that found it, which are logged before the run ends.
    """

    def __init__(self, message: str, metrics: Mapping[str, float] | None = None) -> None:
        super().__init__(message)
        self.metrics = dict(metrics or {})


class State(Protocol):
    """The state of a program: a `flax.struct.dataclass` with an int32 scalar `step`, which only the loop advances."""

    step: Array

    def replace(self, **changes: Any) -> Any: ...


class Program(Protocol):
    """A training objective.

    An optional attribute `shown` lists the metrics that the console shows first; the files have all of them. An
    optional method `unused(variant, sample)` tells `train.aot` which shares of the arithmetic are padding and masked
    scores, as `train.flow.unused.Unused`. A program whose settings choose recomputation or padding has a method
    `plain()`: it returns a copy with the same results and without these, whose step is traced to count model FLOPs.
    """

    name: str

    def frozen(self) -> Any:
        """Return the constant parameters, such as a teacher; {} for none.

        They are host arrays, equal on every process. The loop shards them like parameters and does not checkpoint them.
        """
        ...

    def init_state(self, key: PRNGKeyArray, frozen: Any) -> Any:
        """Return the state at step 0. Must be pure: it is traced abstractly, then compiled with output shardings."""
        ...

    def variant(self, step: int) -> Hashable:
        """Return the variant of a step, such as its stage: a pure function of the step number."""
        ...

    def train_step(
        self, variant: Any, state: Any, frozen: Any, batch: Mapping[str, Array], key: PRNGKeyArray
    ) -> tuple[Any, Metrics]:
        """Return the next state and scalar metrics.

        Must be pure; `key` depends on the seed and the step only. Do not change `state.step`. The loop discards the
        step if a metric whose name ends in `loss` or `grad_norm` is not finite; there must be at least one. These
        metrics should not depend on the new parameters, which would keep both copies in memory.
        """
        ...

    def finish(self, state: Any, folder: pathlib.Path) -> None:
        """Write the result into `folder`, which is empty.

        Every process calls it, with sharded arrays; only process 0 writes. The state is the last one, or the best so
        far where the settings keep that. Equal states must give equal files, which a repeated run leaves alone.
        """
        ...

    def metadata(self) -> dict[str, Any]:
        """Return the JSON that a resumed run must share: protocol, sizes, options of the objective."""
        ...


class EvaluatedProgram(Program, Protocol):
    """A program that also evaluates its state, every `LoopConfig.evaluate_every` steps and at the end."""

    def evaluate(self, state: Any, frozen: Any, folder: pathlib.Path) -> dict[str, float]:
        """Return metrics, logged as eval/NAME, and write samples such as videos into `folder`.

        Every process calls it, so it may run compiled functions over the mesh and `to_host`. It must not donate the
        sharded arrays. Only process 0 writes, and only its metrics are logged; on other processes `folder` does not
        exist. The folder appears as workdir/samples/step_000123 when the call returns, unless it is empty. Derive
        randomness from the step, so that a resumed run evaluates like an uninterrupted one.

        Raises:
          DivergedError: the run should end; samples, metrics and a checkpoint are kept. A run that resumes from that
            checkpoint evaluates it first.
        """
        ...


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """The settings of a run, besides its program and its data.

    Attributes:
      workdir: folder for checkpoints, logs, samples and the result, shared by all processes; local, or gs://BUCKET/PATH.
        Keep files of your own elsewhere: a run that trains further replaces the folders of its results.
      steps: length of the run.
      batch_size: samples in a batch, over all devices and processes.
      updates: None for batches [batch, ...]; n for [n, batch, ...], different samples for each update in a step.
      seed: seed of the initial state, the data order and all randomness in steps.
      checkpoint_every: steps between checkpoints; a state is also saved before it is evaluated.
      keep: newest checkpoints to keep.
      keep_best: best checkpoints by `best_metric` to keep as well; if positive, workdir/best holds the result as of the
        best one, with its step and metric in best.json.
      best_metric: a metric of the program's evaluation, such as 'eval/psnr'.
      best_mode: 'min' where lower is better, or 'max'.
      evaluate_every: steps between evaluations; the last one is at the end. 0 turns evaluations off.
      log_every: steps over which metrics are averaged before they leave the devices.
      max_skips: consecutive skipped steps after which the run ends, at the next log.
      progress: draw a progress bar when standard error is a terminal.
      profile_steps: (first, last) steps to trace into workdir/profile, counted from 1; () for none. Independently,
        SIGUSR1 requests a trace of the next steps of the process that receives it.
      compile_cache: folder of compiled programs, so that a restarted run does not compile again. 'auto' is the
        environment's JAX_COMPILATION_CACHE_DIR; or workdir/compiled, if several processes run and it is in a bucket;
        or a folder in the user's cache. '' keeps JAX's configuration. With several processes on CPU devices, only the
        first can use the cache.
      distributed: run as one of several processes that JAX detects (see `start_processes`).
      start_timeout_s: seconds within which all processes must have started.
    """

    steps: int
    batch_size: int
    workdir: str = top_level('')
    updates: int | None = top_level(None)
    seed: int = top_level(0)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint_every: int = 1000
    keep: int = 3
    keep_best: int = 0
    best_metric: str = ''
    best_mode: str = 'min'
    evaluate_every: int = 0
    log_every: int = 50
    max_skips: int = 20
    progress: bool = True
    profile_steps: tuple[int, ...] = ()
    compile_cache: str = 'auto'
    distributed: bool = False
    start_timeout_s: float = START_TIMEOUT_S

    @property
    def folder(self) -> StoragePath:
        """Return `workdir` as a path."""
        return storage_path(self.workdir, 'config.workdir')

    @property
    def samples(self) -> int:
        """Return the samples that the whole run reads."""
        return self.steps * self.batch_size * (self.updates or 1)

    def __post_init__(self) -> None:
        if self.workdir:
            object.__setattr__(self, 'workdir', str(self.folder))
        check_range(self, 'steps', 'batch_size', 'checkpoint_every', 'keep', 'log_every', 'max_skips', least=1)
        if self.updates is not None:
            check_range(self, 'updates', least=1)
        check_range(self, 'keep_best', 'evaluate_every', least=0)
        check_range(self, 'seed', least=0, below=2**32)
        check_range(self, 'start_timeout_s', above=0, most=LONGEST_TIMEOUT_S)
        steps = self.profile_steps
        if len(steps) not in (0, 2) or (steps and not 1 <= steps[0] <= steps[1]):
            raise InputError(f'profile_steps is {steps}; give the first and the last step, such as (10, 12), or ().')
        self._check_best()

    def _check_best(self) -> None:
        """Raise InputError unless the settings of the best checkpoints fit together."""
        if self.best_mode not in ('min', 'max'):
            raise InputError(f'best_mode is {self.best_mode!r}; use min or max.')
        if not self.keep_best:
            return
        if not self.best_metric.startswith(EVALUATION):
            raise InputError(
                f'best_metric is {self.best_metric!r}, but keep_best is {self.keep_best}; name a metric of the '
                f"program's evaluation, such as '{EVALUATION}loss'."
            )
        if not self.evaluate_every:
            raise InputError(f'keep_best is {self.keep_best}, but evaluate_every is 0; set how often to evaluate.')
