"""Signal-to-noise ratio: 20 log10(|reference| / |reference - got|), in dB (arXiv 2511.06055, table 9)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from export.graphs.runners import Call, GraphRunner

EQUAL_DB, BROKEN_DB = 300.0, -300.0


def snr_db(reference: np.ndarray, got: np.ndarray) -> float:
    """Return the ratio of two arrays of one shape: EQUAL_DB if they are equal, BROKEN_DB if one is not finite."""
    if not (np.isfinite(reference).all() and np.isfinite(got).all()):
        return BROKEN_DB
    signal = np.linalg.norm(np.asarray(reference, np.float64))
    noise = np.linalg.norm(np.asarray(reference, np.float64) - np.asarray(got, np.float64))
    return min(EQUAL_DB, 20 * math.log10(max(signal, 1e-30) / max(noise, 1e-30)))


def call_db(runner: GraphRunner, call: Call, compared: Sequence[str]) -> float:
    """Return the ratio of one recorded call, over all compared outputs together."""
    return snr_db(join_outputs(call.outputs, compared), join_outputs(runner.run(call.inputs), compared))


def lowest_db(runner: GraphRunner, calls: Sequence[Call], compared: Sequence[str]) -> float:
    """Return the lowest ratio over recorded calls."""
    return min(call_db(runner, call, compared) for call in calls)


def join_outputs(outputs: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Return some of the outputs of a graph, flattened and concatenated."""
    return np.concatenate([np.ravel(outputs[name]) for name in names])
