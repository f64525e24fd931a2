"""Runners of graphs: ONNX Runtime on the CPU, the module in JAX, and a recorder of calls."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import jax
import numpy as np

from export.graphs.table import PhoneGraph
from neodragon_jax.generation.param_store import Store


class GraphRunner(Protocol):
    """Runs one graph: `OnnxSession` or `htp.HtpSession`."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name."""
        ...


class OnnxSession:
    """A float or W8A16 graph on ONNX Runtime's CPU provider."""

    def __init__(self, path: pathlib.Path) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
        self._names = [value.name for value in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name."""
        arrays = [np.asarray(array) for array in self._session.run(self._names, dict(feeds))]
        return dict(zip(self._names, arrays, strict=True))


class OnnxPool:
    """Graphs on the CPU provider, opened on demand; only the graphs of one group are in memory at a time."""

    def __init__(self) -> None:
        self._group, self._open = '', dict[pathlib.Path, OnnxSession]()

    def runner(self, path: pathlib.Path, group: str) -> PooledSession:
        """Return a graph; running it closes the graphs of other groups."""
        return PooledSession(self, path, group)

    def run(self, path: pathlib.Path, group: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a graph once; return the outputs by name."""
        if group != self._group:
            self._group = group
            self._open.clear()
        if path not in self._open:
            self._open[path] = OnnxSession(path)
        return self._open[path].run(feeds)


class PooledSession(NamedTuple):
    """A graph of an `OnnxPool`."""

    pool: OnnxPool
    path: pathlib.Path
    group: str

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name."""
        return self.pool.run(self.path, self.group, feeds)


class JaxRunner:
    """A module in JAX, in float32: the reference for its graph, and the source of recorded calls."""

    def __init__(self, graph: PhoneGraph, store: Store) -> None:
        """Compile on demand; `store` decides when parameters are read and how long they stay in memory."""
        self._graph = graph
        self._apply = jax.jit(graph.apply)
        self._params = store.hold(f'graph {graph.name}', lambda: dict(graph.read()))

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name."""
        arrays = self._apply(self._params(), *(feeds[name] for name in self._graph.inputs))
        arrays = arrays if isinstance(arrays, tuple) else (arrays,)
        return {name: np.asarray(array) for name, array in zip(self._graph.outputs, arrays, strict=True)}


class Call(NamedTuple):
    """One call of a graph."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


class RecordingRunner:
    """A runner that wraps another and records every call.

    Attributes:
      calls: in order; the caller may clear it.
    """

    def __init__(self, runner: GraphRunner) -> None:
        self.calls: list[Call] = []
        self._runner = runner

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name."""
        outputs = self._runner.run(feeds)
        self.calls.append(Call(dict(feeds), outputs))
        return outputs
