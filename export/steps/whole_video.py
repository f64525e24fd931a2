"""A whole generation with exported graphs, against the recorded one in JAX."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

from export.graphs.runners import GraphRunner, OnnxPool
from export.graphs.table import DENOISER
from export.host.calibration_set import Dataset
from export.measure.snr import snr_db
from export.qnn.compile import provider_options
from export.qnn.htp import HtpContext, HtpSession, SharedGraph
from export.report.report import VideoRow
from export.steps.graph import Exported, Settings
from export.steps.workshop import Workshop
from neodragon_jax.pyramid.sampler import DrawnNoise

# What runs the graphs.
CPU = 'CPU'
SIMULATOR = 'HTP simulator'


def planned(workshop: Workshop, on_cpu: bool, simulated: bool) -> list[tuple[str, str]]:
    """Return what the evaluation video is generated with again: (graphs, runner)."""

    stages = [f'{DENOISER}{stage}' for stage in range(workshop.source.plan.schedule.stages)]
    runners = [CPU] * on_cpu + [SIMULATOR] * simulated
    parts = []
    if all(name in workshop.names for name in stages):
        parts.append('the denoiser')
        if all(name in workshop.names for name in workshop.modules):
            parts.append('all graphs')
    return [(part, runner) for part in parts for runner in runners]


def generate(
    graphs: str,
    runner: str,
    workshop: Workshop,
    exported: Sequence[Exported],
    settings: Settings,
    dataset: Dataset,
) -> VideoRow:
    """Generate the evaluation video with exported graphs, in the first of their precisions."""

    video, scenes, plan = dataset.video(), dataset.protocol.scenes, workshop.source.plan
    with contextlib.ExitStack() as sessions:
        runners: dict[str, GraphRunner] = {}
        pool = OnnxPool()
        for graph in exported:
            name, target = graph.task.name, settings.targets[0]
            precision = settings.precisions_of(name)[0]
            if graphs == 'the denoiser' and not name.startswith('denoiser'):
                continue
            if runner == CPU:
                # The denoiser's graphs take turns; of the others, none is needed again after the next.
                group = 'denoiser' if name.startswith('denoiser') else name
                runners[name] = pool.runner(graph.precise[precision], group)
            elif name not in settings.shared:
                wrapper = graph.wrappers[precision, target.chipset]
                session = HtpSession(wrapper, provider_options(target, precision))
                runners[name] = sessions.enter_context(session)
        if runner == SIMULATOR and settings.shared:
            runners |= sessions.enter_context(_shared_runners(exported, settings))
        denoise = workshop.graph_denoiser(runners)
        if graphs == 'all graphs':
            again = workshop.program(runners, denoise).generate(scenes, 0)
            latents, frames = again.latents, again.frames
        else:
            noise = DrawnNoise(scenes.keys(0), plan.schedule)
            latents, frames = video.replay(denoise, plan, noise), None
    assert video.latents is not None and latents is not None  # the denoiser is among the graphs, see `planned`
    kept = video.generated
    frames_db = None if frames is None or video.frames is None else snr_db(video.frames, frames)
    return VideoRow(graphs, runner, snr_db(video.latents[:, kept], latents[:, kept]), frames_db)


@contextlib.contextmanager
def _shared_runners(exported: Sequence[Exported], settings: Settings) -> Iterator[dict[str, GraphRunner]]:
    """Yield the graphs of the common binary, which the simulator runs only where it is compiled: compiled again."""
    target, precision = settings.targets[0], settings.precisions_of(settings.shared[0])[0]
    options = provider_options(target, precision)
    with tempfile.TemporaryDirectory(dir=settings.out) as folder:
        jobs = {
            graph.task.name: SharedGraph(
                graph.precise[precision], pathlib.Path(folder) / f'{graph.task.name}.onnx', options
            )
            for graph in exported
            if graph.task.name in settings.shared
        }
        with HtpContext(jobs) as context:
            yield {name: context.runner(name) for name in jobs}
