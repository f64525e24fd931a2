"""Choice of the bits of the denoiser's keys and values: 8 where validation prompts allow it, else 16, with the reason.

Ranges are measured on calibration prompts. The choice is made on validation prompts, which are disjoint from them and
from the evaluation prompts. With 8 bits, every stage must reach its target on single calls, and the stages together
must reach the target of the last latent frame of whole videos, each with a margin: the errors of all calls accumulate
in that frame. All stages take the same bits. With 8 bits in one stage alone, every call of the shipped model was above
its target, but the last frame fell from 30.0 to 24.3, 18.6 and 23.2 dB (stages 0, 1 and 2; lowest of eight videos).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from export.graphs.runners import OnnxSession
from export.graphs.table import DENOISER, VIDEO_TARGET_DB
from export.host.calibration_set import CalibrationSet
from export.host.phone_program import PhoneProgram
from export.host.recorded_graph import RecordedGraph
from export.measure.snr import lowest_db, snr_db
from export.quantize.key_value import MARGIN_DB, NATIVE_BITS, RECIPE, WIDE_BITS
from export.steps.code_identity import made_by
from export.steps.graph import OnStep
from export.steps.options import ExportOptions
from export.steps.quantization import CANDIDATES, write_stage
from export.steps.step_cache import finished_or_made


@dataclasses.dataclass(frozen=True)
class Choice:
    """The chosen bits and the measured reason; an entry of a recipe.

    Attributes:
      calls_db: lowest ratio with 8 bits over the validation calls of each stage that was tried.
      video_db: lowest ratio of the last latent frame over the validation videos with 8 bits in all stages; None if no
        video was generated.
    """

    bits: int
    calls_db: Mapping[str, float]
    video_db: float | None
    reason: str


def steps_of(options: ExportOptions) -> int:
    """Return the number of steps that `choose` reports."""
    return int(any(_is_quantized(name, options) for name in options.names))


def choose(
    graphs: Sequence[RecordedGraph],
    program: PhoneProgram,
    options: ExportOptions,
    calibration: CalibrationSet,
    on_step: OnStep,
) -> Choice | None:
    """Choose the bits of keys and values; a finished choice is kept. Return None if no stage is quantized.

    Whole videos are generated if all stages are exported and options.whole_video is set.

    Args:
      graphs: the graphs of the export.
      on_step: called with one line when the choice is made.
    """
    stages = [graph for graph in graphs if _is_quantized(graph.name, options)]
    if not stages:
        return None
    videos = options.whole_video and len(stages) == program.denoiser.stages
    source = {
        'graphs': {graph.name: graph.made_from for graph in stages},
        'calibration_sha256': calibration.sha256,
        'calibration_samples': {graph.name: options.graphs.samples_of(graph.name) for graph in stages},
        'whole_videos': videos,
        **made_by(__name__),
    }

    write = functools.partial(_write_choice, stages, program if videos else None, calibration)
    made = finished_or_made(options.graphs.out / CANDIDATES, source, write)
    choice = Choice(**{field.name: made[field.name] for field in dataclasses.fields(Choice)})
    on_step(f'{choice.bits} bits for keys and values: {choice.reason}')
    return choice


def _write_choice(
    stages: Sequence[RecordedGraph], program: PhoneProgram | None, calibration: CalibrationSet, folder: pathlib.Path
) -> dict[str, Any]:
    """Choose; write the recipe and the chosen stages into a folder. Return the recipe's entry."""
    choice = _choose(stages, program, calibration, folder)
    if choice.bits != NATIVE_BITS:
        for file in folder.glob('*.onnx*'):
            file.unlink()
    entry = dataclasses.asdict(choice)
    (folder / RECIPE).write_text(json.dumps(entry, indent=2) + '\n')
    return entry


def _is_quantized(name: str, options: ExportOptions) -> bool:
    """Return whether a graph is a stage of the denoiser that is exported in W8A16."""
    return name.startswith(DENOISER) and 'w8a16' in options.graphs.precisions_of(name)


def _choose(
    stages: Sequence[RecordedGraph], program: PhoneProgram | None, calibration: CalibrationSet, folder: pathlib.Path
) -> Choice:
    """Write the stages with 8 bits until one misses its aim, then generate videos unless `program` is None."""
    calls_db, sessions = dict[str, float](), dict[str, OnnxSession]()
    for graph in stages:
        path = folder / f'{graph.name}.onnx'
        write_stage(graph, NATIVE_BITS, path)
        sessions[graph.name] = OnnxSession(path)
        reached = calls_db[graph.name] = lowest_db(sessions[graph.name], graph.validation(), graph.compared)
        aim = graph.spec.target_db + MARGIN_DB
        if reached < aim:
            return Choice(
                WIDE_BITS,
                calls_db,
                None,
                f'{graph.name} reaches {reached:.1f} dB with {NATIVE_BITS}, of {aim:.1f} asked for',
            )
    if program is None:
        return Choice(NATIVE_BITS, calls_db, None, 'every stage reaches its target; no video was generated')
    video_db = _last_frame_db(program, sessions, calibration)
    aim = VIDEO_TARGET_DB + MARGIN_DB
    if video_db < aim:
        reason = f'the last latent frame reaches {video_db:.1f} dB with {NATIVE_BITS}, of {aim:.1f} asked for'
        return Choice(WIDE_BITS, calls_db, video_db, reason)
    return Choice(NATIVE_BITS, calls_db, video_db, f'the last latent frame reaches {video_db:.1f} dB')


def _last_frame_db(program: PhoneProgram, stages: Mapping[str, OnnxSession], calibration: CalibrationSet) -> float:
    """Return the lowest ratio of the last latent frame over the validation videos."""
    scenes, plan = calibration.protocol.validation, program.options.plan
    denoise, reached = program.denoiser.denoiser(stages), list[float]()
    for number in range(len(scenes.prompts)):
        video = calibration.validation_video(number)
        latents = video.replay(denoise, plan, scenes.noise(number, plan.schedule))
        assert video.latents is not None  # the denoiser is among the graphs
        reached.append(snr_db(video.latents[:, -1], latents[:, -1]))
    return min(reached)
