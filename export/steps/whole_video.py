"""A whole generation with exported graphs, compared with the recorded one in JAX."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

from export.graphs.runners import GraphRunner, OnnxPool
from export.graphs.table import DENOISER
from export.host.calibration_set import CalibrationSet
from export.host.phone_program import PhoneProgram
from export.measure.snr import snr_db
from export.qnn.compile import provider_options
from export.qnn.htp import HtpContext, HtpSession, SharedGraph
from export.report.rows import VideoRow
from export.steps.graph import ExportedGraph
from export.steps.options import GraphOptions
from neodragon_jax.base.atomic import scratch_folder

# Prefix of the names of the denoiser's graphs, including the modulation graph.
_DENOISER = 'denoiser'


@dataclasses.dataclass(frozen=True)
class Replay:
    """The generation of evaluation videos with exported graphs.

    Attributes:
      all_graphs: whether all modules run as graphs; otherwise only the denoiser does.
      simulated: whether graphs run on the HTP simulator; otherwise they run on the CPU.
    """

    all_graphs: bool
    simulated: bool

    @property
    def graphs(self) -> str:
        """Label of the graphs that run."""
        return 'all graphs' if self.all_graphs else 'the denoiser'

    @property
    def runner(self) -> str:
        """Label of the runtime."""
        return 'HTP simulator' if self.simulated else 'CPU'


# The one whose ratio is expected of a bundle.
ALL_ON_CPU = Replay(all_graphs=True, simulated=False)


def planned(program: PhoneProgram, on_cpu: bool, simulated: bool) -> list[Replay]:
    """Return the possible generations with the exported graphs."""
    stages = [f'{DENOISER}{stage}' for stage in range(program.options.plan.schedule.stages)]
    if not all(name in program.names for name in stages):
        return []
    parts = [False] + [True] * all(name in program.names for name in program.modules)
    runners = [False] * on_cpu + [True] * simulated
    return [Replay(part, runner) for part in parts for runner in runners]


def generate(
    replay: Replay,
    program: PhoneProgram,
    exported: Sequence[ExportedGraph],
    options: GraphOptions,
    calibration: CalibrationSet,
    count: int,
) -> VideoRow:
    """Generate the videos of the first `count` evaluation prompts, with each graph in its first precision."""
    scenes, plan = calibration.protocol.evaluation, program.options.plan
    used = [graph for graph in exported if replay.all_graphs or graph.name.startswith(_DENOISER)]
    latents_db, last_db, frames_db = dict[str, float](), dict[str, float](), dict[str, float]()
    with _runners(used, options, replay.simulated) as runners:
        denoise = program.denoiser.denoiser(runners)
        whole = program.over(runners, denoise) if replay.all_graphs else None
        for number, prompt in enumerate(scenes.prompts[:count]):
            video, frames = calibration.video(number), None
            if whole is None:
                latents = video.replay(denoise, plan, scenes.noise(number, plan.schedule))
            else:
                again = whole.generate(scenes, number)
                latents, frames = again.latents, again.frames
            assert video.latents is not None and latents is not None  # the denoiser is among the graphs, see `planned`
            made = video.generated
            latents_db[prompt] = snr_db(video.latents[:, made], latents[:, made])
            last_db[prompt] = snr_db(video.latents[:, -1], latents[:, -1])
            if frames is not None and video.frames is not None:
                frames_db[prompt] = snr_db(video.frames, frames)
    return VideoRow(replay.graphs, replay.runner, latents_db, last_db, frames_db)


@contextlib.contextmanager
def _runners(
    exported: Sequence[ExportedGraph], options: GraphOptions, simulated: bool
) -> Iterator[dict[str, GraphRunner]]:
    """Yield runners of graphs by name."""
    if not simulated:
        yield _cpu_runners(exported, options)
        return
    target, runners = options.targets[0], dict[str, GraphRunner]()
    shared = options.shared([graph.name for graph in exported])
    with contextlib.ExitStack() as sessions:
        for graph in exported:
            precision = options.precisions_of(graph.name)[0]
            if graph.name not in shared:
                session = HtpSession(graph.wrappers[precision, target.chipset], provider_options(target, precision))
                runners[graph.name] = sessions.enter_context(session)
        stages = [graph for graph in exported if graph.name in shared]
        if stages:
            runners |= sessions.enter_context(_shared_runners(stages, options))
        yield runners


def _cpu_runners(exported: Sequence[ExportedGraph], options: GraphOptions) -> dict[str, GraphRunner]:
    """Return runners on the CPU that keep only the graphs in use in memory."""
    pool, runners = OnnxPool(), dict[str, GraphRunner]()
    for graph in exported:
        # The denoiser's graphs alternate. Any other graph finishes before the next one starts.
        group = _DENOISER if graph.name.startswith(_DENOISER) else graph.name
        runners[graph.name] = pool.runner(graph.precise[options.precisions_of(graph.name)[0]], group)
    return runners


@contextlib.contextmanager
def _shared_runners(stages: Sequence[ExportedGraph], options: GraphOptions) -> Iterator[dict[str, GraphRunner]]:
    """Yield runners of the shared binary's graphs, recompiled because the simulator runs them only in that process."""
    target, precision = options.targets[0], options.precisions_of(stages[0].name)[0]
    with scratch_folder(options.out) as folder:
        jobs = {
            stage.name: SharedGraph(
                stage.precise[precision],
                folder / f'{stage.name}.onnx',
                provider_options(target, precision),
            )
            for stage in stages
        }
        with HtpContext(jobs) as context:
            yield {name: context.runner(name) for name in jobs}
