"""The program whose graphs are exported: it runs in JAX to record calls, or over exported graphs to test them."""

from __future__ import annotations

import dataclasses
import functools

from export.graphs.denoiser import SHIPPED
from export.graphs.table import DENOISER, GRAPH_SPECS, MODULATION
from export.host.denoiser_graphs import DenoiserGraphs
from export.host.modules import ProgramOptions, phone_modules
from export.host.recording_program import RecordingProgram


@dataclasses.dataclass(frozen=True)
class PhoneProgram(RecordingProgram):
    """The program of a checkpoint with the denoiser's graphs."""

    @functools.cached_property
    def denoiser(self) -> DenoiserGraphs:
        """The denoiser's graphs."""
        form = dataclasses.replace(SHIPPED, supports_frame_zero=not self.starts_from_picture)
        return DenoiserGraphs(self.folder, self.options.plan, self.options.text_tokens, form)


def available(options: ProgramOptions) -> list[str]:
    """Return the names of the graphs of a checkpoint in a mode, in the table's order."""
    stages = (f'{DENOISER}{stage}' for stage in range(options.plan.schedule.stages))
    have = {*phone_modules(options), MODULATION, *stages}
    return [name for name in GRAPH_SPECS if name in have]
