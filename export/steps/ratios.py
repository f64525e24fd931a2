"""Ratios of an ONNX file or a binary on recorded calls; their code alone identifies a finished measurement.

All calls run on the CPU. The simulator takes minutes per call at full size and runs only the calls with the lowest
ratios.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from export.graphs.runners import Call, GraphRunner, OnnxSession
from export.host.recording import spread
from export.measure.snr import lowest_db
from export.qnn.htp import HtpSession

if TYPE_CHECKING:
    from export.host.recorded_graph import RecordedGraph

Ratios = Mapping[str, Sequence[float]]  # evaluation prompt -> ratio of each of its calls in dB


def cpu_ratios(recorded: RecordedGraph, path: pathlib.Path, count: int) -> Ratios:
    """Return the ratios of an ONNX file on the CPU, on the first `count` calls of every evaluation prompt."""
    session = OnnxSession(path)
    return {
        prompt: [lowest_db(session, [call], recorded.compared) for call in found[:count]]
        for prompt, found in recorded.evaluation().items()
    }


def simulated_calls(recorded: RecordedGraph, ratios: Ratios | None, count: int) -> list[Call]:
    """Return the calls to simulate: those with the lowest ratios on the CPU, or the first calls of different prompts.

    Args:
      ratios: ratios on the CPU; None if they are unknown.
    """
    calls = recorded.evaluation()
    if ratios is None:
        return spread([found[0] for found in calls.values()], count)
    entries = [(db, prompt, index) for prompt, found in ratios.items() for index, db in enumerate(found)]
    return [calls[prompt][index] for _, prompt, index in sorted(entries)[:count]]


def simulate(runner: GraphRunner, recorded: RecordedGraph, calls: Sequence[Call], peak: Callable[[], float]) -> Any:
    """Return the lowest ratio of a graph on the simulator in dB, with the time and peak memory of the runs."""
    start = time.monotonic()
    reached = float(lowest_db(runner, calls, recorded.compared))
    return {'db': reached, 'seconds': round(time.monotonic() - start, 1), 'peak_gb': round(peak(), 2)}


def simulate_binary(
    recorded: RecordedGraph, wrapper: pathlib.Path, provider_options: Mapping[str, str], calls: Sequence[Call]
) -> Any:
    """Return the result of `simulate` for a binary of one graph.

    Args:
      wrapper: ONNX file that wraps the binary.
    Raises:
      InputError: the binary does not load or run.
    """
    with HtpSession(wrapper, provider_options) as session:
        return simulate(session, recorded, calls, session.peak_gb)
