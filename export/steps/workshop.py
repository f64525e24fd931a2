"""What an export works on: the graphs of a checkpoint with the recorded calls around them.

`Workshop` knows the checkpoint, the plan and the calibration set. It makes the tasks of build.py, and puts exported
graphs back into the whole program.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from export.compare_stage import Size
from export.graphs.denoiser import SHIPPED, Form, denoiser_graphs
from export.graphs.modulation import MODULATION, modulation_graph
from export.graphs.runners import Call, GraphRunner, JaxRunner, RecordingRunner
from export.graphs.stored_params import StoredParams
from export.graphs.table import DENOISER, DEPLOYMENTS, Feeds, Graph, Module
from export.host import modules
from export.host.calibration_set import Dataset, folder_sha256
from export.host.denoiser_host import DenoiserHost, GraphDenoiser
from export.host.recording import Program, Recorder, Recording, Sample, calls_per_video
from export.steps.comparison import Subject
from export.steps.graph import Task
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.generation import pipeline
from neodragon_jax.generation.param_store import Store
from neodragon_jax.models.mmdit import PyramidMMDiT

# Calibration calls that settings are chosen by: one per step of the UNet.
JUDGING_CALLS = 4


@dataclasses.dataclass(frozen=True)
class Workshop:
    """The graphs of a checkpoint, for videos of one size.

    Attributes:
      source: checkpoint, mode and plan.
      denoiser: its folder.
      names: graphs to export, in the table's order.
    """

    source: modules.Source
    denoiser: pathlib.Path
    names: Sequence[str]

    @functools.cached_property
    def modules(self) -> dict[str, Module]:
        """All modules but the denoiser, by name."""
        return modules.phone_modules(self.source)

    @property
    def draws(self) -> bool:
        """Whether the program draws first frames: asked to export that, or in need of one with no image given."""
        wanted = any(name in modules.FIRST_FRAME for name in self.names)
        needed = self.denoises or 'video_encoder' in self.names
        return self.source.has_model and (wanted or (needed and not self.source.images))

    @property
    def denoises(self) -> bool:
        """Whether recorded videos go beyond the first frame, which takes most of the time."""
        return self.decodes or any(name == MODULATION or name.startswith(DENOISER) for name in self.names)

    @property
    def decodes(self) -> bool:
        """Whether recorded videos are decoded."""
        return any(name in ('video_decoder', 'super_resolution') for name in self.names)

    @property
    def first_frame(self) -> bool:
        """Whether videos start from a first frame."""
        return self.draws or self.source.images

    @property
    def calls(self) -> dict[str, int]:
        """How often a video calls each graph that is recorded."""
        calls = calls_per_video(self.source.plan, self.first_frame)
        return {
            name: count
            for name, count in calls.items()
            if name in self.names or (self.denoises and name.startswith(DENOISER))
        }

    @property
    def form(self) -> Form:
        """The form of the denoiser's graphs."""
        return dataclasses.replace(SHIPPED, draws_frame_zero=not self.first_frame)

    @property
    def subject(self) -> Subject:
        """What --compare is about."""
        plan, (model, _) = self.source.plan, self._denoiser
        patch = model.config.patch_size
        grid = (plan.height // patch, plan.width // patch)
        size = Size(plan.schedule.stages, plan.frames - 1, grid, self.source.text_tokens)
        return Subject(model.config, size, self.form)

    def folders(self) -> dict[str, pathlib.Path]:
        """Return the folder of every component that decides what a video is."""
        folders = {name: module.folder for name, module in self.modules.items()}
        return {**folders, 'denoiser': self.denoiser}

    @functools.cached_property
    def weights(self) -> dict[str, str]:
        """Hash of every component's weights."""
        of_folder = {folder: folder_sha256(folder) for folder in set(self.folders().values())}
        return {name: of_folder[folder] for name, folder in self.folders().items()}

    def open_recording(self) -> Recording:
        """Return the program in JAX, with the parameters of one module at a time in memory."""
        store = Store(one_at_a_time=True)
        runners = {name: RecordingRunner(JaxRunner(module, store)) for name, module in self.modules.items()}
        base = self._base(store)  # of whose modules only the denoiser is used
        recorder = Recorder(base.denoise)
        return Recording(self.program(runners, recorder, base), runners, recorder)

    def program(
        self,
        runners: Mapping[str, GraphRunner],
        denoise: Any,
        base: pipeline.Components | None = None,
    ) -> Program:
        """Return the whole program over runners of graphs.

        Args:
          denoise: the denoiser.
          base: where the denoiser's sizes come from.
        """
        base = base or self._base(Store(one_at_a_time=True))
        host = modules.Host.load(self.source)
        drawing = modules.FirstFrameHost.load(self.source) if self.draws else None
        return Program(
            modules.components(host, runners, denoise, base),
            base.check(self.source.plan),
            drawing and modules.first_frame_model(drawing, runners),
            modules.upscaler(runners) if 'super_resolution' in self.modules and self.decodes else None,
            self.denoises,
            self.decodes,
        )

    def tasks(self, dataset: Dataset, counts: Mapping[str, int], evaluation: int) -> Iterator[Task]:
        """Yield the task of every graph.

        Args:
          counts: calibration calls per graph.
          evaluation: calls per graph to measure by.
        """
        plan = {'plan': dataset.protocol.to_json()['plan']}
        for name in self.names:
            if name in self.modules:
                module = self.modules[name]
                made_from = {'weights_sha256': self.weights[name], **plan}
                read = functools.partial(_calls, dataset, name)
                yield self._task(name, [module.output], module.graph, made_from, read, counts[name], evaluation)
            else:
                made_from = {'weights_sha256': self.weights['denoiser'], 'form': dataclasses.asdict(self.form), **plan}
                read = functools.partial(self._denoiser_calls, dataset, name)
                make = functools.partial(self._denoiser_graph, name)
                judged = make().judged if name == MODULATION else ['flow']
                yield self._task(name, judged, make, made_from, read, counts[name], evaluation)

    def host(self, modulate: Callable[[Feeds], Mapping[str, np.ndarray]] | None = None) -> DenoiserHost:
        """Return the host's half of the denoiser.

        Args:
          modulate: runs the modulation graph; None computes the same in JAX.
        """
        model, params = self._denoiser
        return DenoiserHost(model, params, self.form, modulate)

    def graph_denoiser(self, runners: Mapping[str, GraphRunner]) -> GraphDenoiser:
        """Return the denoiser over the graphs of its stages, and of its modulation if that is among them."""
        modulate = runners[MODULATION].run if MODULATION in runners else None
        stages = range(self.source.plan.schedule.stages)
        return GraphDenoiser(self.host(modulate), [runners[f'{DENOISER}{stage}'] for stage in stages])

    def _task(
        self,
        name: str,
        judged: Sequence[str],
        make: Callable[[], Graph],
        made_from: dict[str, Any],
        read: Callable[[str, int], Iterator[Call]],
        count: int,
        evaluation: int,
    ) -> Task:
        return Task(
            name=name,
            judged=judged,
            make=make,
            made_from=made_from,
            calibration=lambda: (call.inputs for call in read('calibration', count)),
            judging=lambda: list(read('calibration', min(count, JUDGING_CALLS))),
            evaluation=lambda: list(read('evaluation', evaluation)),
        )

    def _denoiser_calls(self, dataset: Dataset, name: str, part: str, count: int) -> Iterator[Call]:
        """Yield recorded calls of the denoiser as calls of one of its graphs."""
        host = self._host
        if name == MODULATION:
            for sample in _calls(dataset, f'{DENOISER}0', part, count):
                inputs = host.modulation_inputs(sample.prompt, sample.timestep)
                yield Call(inputs, host.modulation(inputs))
            return
        for sample in _calls(dataset, name, part, count):
            assert isinstance(sample, Sample)
            yield Call(host.stage_inputs(*sample[:-1]), {'flow': host.patches(sample.flow)})

    def _denoiser_graph(self, name: str) -> Graph:
        if name == MODULATION:
            return modulation_graph(*self._denoiser)
        return self._stages[int(name.removeprefix(DENOISER))]

    @functools.cached_property
    def _stages(self) -> Sequence[Graph]:
        model, params = self._denoiser
        plan, patch = self.source.plan, model.config.patch_size
        grid = (plan.height // patch, plan.width // patch)
        return denoiser_graphs(
            model, params, plan.frames - 1, grid, self.source.text_tokens, plan.schedule.stages, self.form
        )

    @functools.cached_property
    def _denoiser(self) -> tuple[PyramidMMDiT, Mapping[str, Any]]:
        # Read block by block: at full size they would hold 6 GB in float32.
        stored = StoredParams(pathlib.Path(self.denoiser))
        assert isinstance(stored.module, PyramidMMDiT)
        return stored.module, stored

    @functools.cached_property
    def _host(self) -> DenoiserHost:
        return self.host()

    def _base(self, store: Store) -> pipeline.Components:
        source = self.source
        return pipeline.load(source.root, source.mode, self.denoiser, source.adapter, jnp.float32, store=store)


def available(source: modules.Source) -> list[str]:
    """Return the names of the graphs that a checkpoint has in a mode, in the table's order."""
    have = {*modules.phone_modules(source), MODULATION, *(f'{DENOISER}{i}' for i in range(source.plan.schedule.stages))}
    return [name for name in DEPLOYMENTS if name in have]


def check_denoiser(folder: pathlib.Path) -> None:
    """Raise InputError unless a folder holds a denoiser."""
    model = checkpoint.load_module(folder)
    if not isinstance(model, PyramidMMDiT):
        raise InputError(f'{folder}: holds a {type(model).__name__}; pass the folder of a PyramidMMDiT.')


def _calls(dataset: Dataset, name: str, part: str, count: int) -> Iterator[Any]:
    """Yield recorded calls of a graph: for calibration, or of the video that calibration did not see."""
    return dataset.calls(name, count) if part == 'calibration' else iter(dataset.evaluation(name, count))
