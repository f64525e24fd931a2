"""A graph to export with the recorded calls that calibrate and evaluate it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from export.graphs.runners import Call
from export.graphs.table import DENOISER, GRAPH_SPECS, MODULATION, Feeds, GraphSpec, PhoneGraph
from export.host.calibration_set import CalibrationSet
from export.host.phone_program import PhoneProgram
from export.host.recording import Sample

# Calls of each validation video that settings are chosen on. The first sees the shortest history, the last the longest.
VALIDATION_CALLS = 2


@dataclasses.dataclass(frozen=True)
class RecordedGraph:
    """A graph and its recorded calls; everything is read on demand.

    Attributes:
      name: row of the table.
      compared: names of the outputs that the ratio is measured on.
      make: returns the graph.
      made_from: hashes and sizes that determine the result of `make`, besides its code.
      calibration_sha256: hash of the calibration set.
      calibration: yields the inputs that activation ranges are measured on.
      validation: returns the calls that quantization settings are chosen on, with their JAX outputs; their prompts are
        neither calibration nor evaluation prompts. Empty if no graph is quantized.
      evaluation: returns the calls of each evaluation prompt; these are excluded from calibration and validation.
    """

    name: str
    compared: Sequence[str]
    make: Callable[[], PhoneGraph]
    made_from: dict[str, Any]
    calibration_sha256: str
    calibration: Callable[[], Iterator[Feeds]]
    validation: Callable[[], Sequence[Call]]
    evaluation: Callable[[], Mapping[str, Sequence[Call]]]

    @property
    def spec(self) -> GraphSpec:
        """The graph's row in the table."""
        return GRAPH_SPECS[self.name]


def recorded_graphs(
    program: PhoneProgram, calibration: CalibrationSet, counts: Mapping[str, int], evaluation: int
) -> Iterator[RecordedGraph]:
    """Yield the graphs of a program with their calls.

    Args:
      counts: calibration calls per graph.
      evaluation: evaluation calls per graph and prompt.
    """
    sizes = {'plan': calibration.protocol.to_json()['plan'], 'text_tokens': program.options.text_tokens}
    for name in program.names:
        if name in program.modules:
            module = program.modules[name]
            compared, weights = module.compared, program.weights[name]
            make = functools.partial(program.modules.__getitem__, name)
            made_from = {'weights_sha256': weights, **sizes}
        else:
            make, weights = functools.partial(program.denoiser.graph, name), program.weights['denoiser']
            compared = make().compared if name == MODULATION else ['flow']
            made_from = {'weights_sha256': weights, 'form': dataclasses.asdict(program.denoiser.form), **sizes}
        calls = _Calls(program, calibration, name)
        yield RecordedGraph(
            name=name,
            compared=compared,
            make=make,
            made_from=made_from,
            calibration_sha256=calibration.sha256,
            calibration=functools.partial(calls.inputs, counts[name]),
            validation=functools.partial(calls.validation, VALIDATION_CALLS),
            evaluation=functools.partial(calls.evaluation, evaluation),
        )


@dataclasses.dataclass(frozen=True)
class _Calls:
    """The recorded calls of one graph; calls of the denoiser are converted to calls of its graphs."""

    program: PhoneProgram
    calibration: CalibrationSet
    name: str

    @property
    def recorded(self) -> str:
        """Name that the calls are recorded under."""
        return f'{DENOISER}0' if self.name == MODULATION else self.name

    def inputs(self, count: int) -> Iterator[Feeds]:
        return (self._call(recorded).inputs for recorded in self.calibration.calls(self.recorded, count))

    def validation(self, count: int) -> list[Call]:
        calls = self.calibration.validation(self.recorded, count).values()
        return [self._call(recorded) for found in calls for recorded in found]

    def evaluation(self, count: int) -> dict[str, Sequence[Call]]:
        calls = self.calibration.evaluation(self.recorded, count)
        return {prompt: [self._call(recorded) for recorded in found] for prompt, found in calls.items()}

    def _call(self, recorded: Call | Sample) -> Call:
        if isinstance(recorded, Call):
            return recorded
        host = self.program.denoiser.jax_host
        if self.name == MODULATION:
            inputs = host.modulation_inputs(recorded.prompt, recorded.timestep)
            return Call(inputs, host.modulation(inputs))
        return Call(host.stage_inputs(*recorded[:-1]), {'flow': host.patches(recorded.flow)})
