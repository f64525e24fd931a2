"""Run the phases of a bundle one after the other, with the graphs of one phase in memory at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from neodragon_phone.backends import Backend, Session
from neodragon_phone.bundle import Bundle
from neodragon_phone.errors import BundleError


class Sessions(dict[str, Session]):
    """The graphs of a phase by name; one that is not among them is an error of the bundle."""

    def __missing__(self, name: str) -> Session:
        raise BundleError(f'{name}: not among the graphs of its phase. Copy the bundle again.')


@dataclasses.dataclass
class Times:
    """Seconds of a graph: its load, and each of its runs."""

    load: float = 0.0
    runs: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Player:
    """A bundle on a backend.

    Attributes:
      bundle: verified.
      backend: where its graphs run.
      report: takes lines of progress.
      times: of every graph that was loaded.
      canary_db: ratio of every graph on its recorded call, once it has run.
      check_graphs: whether to run a graph's recorded call when it is loaded for the first time.
    """

    bundle: Bundle
    backend: Backend
    report: Callable[[str], object] = lambda line: None
    times: dict[str, Times] = dataclasses.field(default_factory=dict)
    canary_db: dict[str, float] = dataclasses.field(default_factory=dict)
    check_graphs: bool = True

    @property
    def manifest(self) -> Any:
        """The manifest of the bundle."""
        return self.bundle.manifest

    def has(self, graph: str) -> bool:
        """Return whether the bundle has a graph."""
        return graph in self.manifest['graphs']

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Sessions]:
        """Yield the graphs of a phase, loaded; all are closed at the end.

        Raises:
          BundleError: a graph does not load, or computes another result than recorded.
        """
        (phase,) = [phase for phase in self.manifest['phases'] if phase['name'] == name] or [None]
        if phase is None:
            raise BundleError(f'manifest.json: there is no phase {name!r}. Copy the bundle again.')
        self.report(f'{name}: {", ".join(phase["graphs"])}')
        start = time.perf_counter()
        opened = self.backend.open(phase['graphs'])
        load = (time.perf_counter() - start) / max(len(opened), 1)
        sessions = Sessions()
        for graph, session in opened.items():
            entry = self.manifest['graphs'][graph]
            sessions[graph] = Session(graph, session, entry['inputs'], entry['outputs'])
            self.times.setdefault(graph, Times()).load += load
        del opened
        if self.check_graphs:
            for graph, session in sessions.items():
                self._check(graph, session)
        try:
            yield sessions
        finally:
            for graph, session in sessions.items():
                self.times[graph].runs += session.seconds
            sessions.clear()

    def check_all(self) -> None:
        """Run the recorded call of every graph, phase by phase."""
        for phase in self.manifest['phases']:
            with self.phase(phase['name']):
                pass

    def _check(self, graph: str, session: Session) -> None:
        """Raise BundleError unless the recorded call of a graph gives the recorded result."""
        if graph in self.canary_db:
            return
        inputs, expected = self.bundle.call(graph)
        outputs = session(inputs)
        session.seconds.clear()
        vector = self.manifest['graphs'][graph]['vector']
        reached = min(snr_db(expected[name], outputs[name]) for name in vector['compared'])
        self.canary_db[graph] = reached
        self.report(f'  canary {graph}: {reached:.1f} dB')
        if not reached >= vector['minimum_db']:
            raise BundleError(
                f'{graph}: its recorded call gives {reached:.1f} dB, not {vector["minimum_db"]:.1f}: this runtime or '
                'chip computes something else. Update the runtime, or use --backend cpu.'
            )


def snr_db(reference: np.ndarray, got: np.ndarray) -> float:
    """Return 20 log10(|reference| / |reference - got|) in dB; 300 where they are equal, -300 if one is not finite."""
    if not (np.isfinite(reference).all() and np.isfinite(got).all()):
        return -300.0
    signal = np.linalg.norm(np.asarray(reference, np.float64))
    noise = np.linalg.norm(np.asarray(reference, np.float64) - np.asarray(got, np.float64))
    return min(300.0, 20 * math.log10(max(signal, 1e-30) / max(noise, 1e-30)))


def lines_of_times(times: dict[str, Times]) -> list[str]:
    """Return a table of load and run times."""
    lines = [f'{"graph":<24}{"load s":>9}{"runs":>6}{"min ms":>10}{"median ms":>11}']
    for graph, entry in times.items():
        runs = [1000 * seconds for seconds in entry.runs] or [math.nan]
        lines.append(f'{graph:<24}{entry.load:>9.2f}{len(entry.runs):>6}{min(runs):>10.1f}{np.median(runs):>11.1f}')
    return lines
