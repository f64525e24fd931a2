"""The export, step by step: record; export, compile and measure every graph; write the report and the bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence

import jax

from export.host.calibration_set import CalibrationSet
from export.host.phone_program import PhoneProgram
from export.host.prompts import (
    FEWEST_CALIBRATION_PROMPTS,
    FEWEST_EVALUATION_PROMPTS,
    FEWEST_VALIDATION_PROMPTS,
)
from export.host.protocol import Protocol
from export.host.recorded_graph import RecordedGraph, recorded_graphs
from export.host.recording import Scenes, videos_needed
from export.report.report import Report
from export.report.rows import Row, SharedBinary, VideoRow
from export.steps import comparison, graph, key_value_bits, phone_bundle, shared_binary, whole_video
from export.steps.code_identity import made_by, recorded_by
from export.steps.evaluation import check_float, measure
from export.steps.graph import ExportedGraph, OnStep
from export.steps.options import ExportOptions
from export.steps.progress import Progress
from neodragon_jax.base.compile_cache import use_compile_cache
from neodragon_jax.base.output import output_folder
from neodragon_jax.generation.safety import has_checker


def run(options: ExportOptions) -> Report:
    """Export all requested graphs; write the report and return it.

    Raises:
      InputError: the checkpoint, the calibration set or an option is invalid, another process writes into a folder, or
        a graph does not compile.
    """
    use_compile_cache()
    # The reference must be float32 also on accelerators.
    with jax.default_matmul_precision('highest'):
        return _run(options)


def _run(options: ExportOptions) -> Report:
    program = PhoneProgram(options.program, options.denoiser, options.names)
    subject = comparison.subject_of(program.denoiser) if options.graphs.compare else None
    if subject is not None:
        comparison.check(options.names, subject)
    protocol = _protocol(options, program)
    with contextlib.ExitStack() as locks:
        for folder in dict.fromkeys((options.graphs.out, options.calibration)):
            locks.enter_context(output_folder(folder))
        return _make(options, program, protocol, subject)


def _make(
    options: ExportOptions, program: PhoneProgram, protocol: Protocol, subject: comparison.Subject | None
) -> Report:
    """Run the export in the locked folders."""
    replays = whole_video.planned(program, options.whole_video, options.simulate_video)
    calibration = CalibrationSet.open(options.calibration, protocol)
    # Before the work, as half of a safety checker is refused.
    warnings = [*warnings_of(calibration.protocol), *safety_warnings(options.program.root)]
    progress = Progress(_steps(options, calibration) + len(replays))
    calibration.record(program.open_recording, progress)
    counts = {name: options.graphs.samples_of(name) for name in options.names}
    graphs = list(recorded_graphs(program, calibration, counts, options.graphs.evaluation_samples))
    choice = key_value_bits.choose(graphs, program, options, calibration, progress)
    exported, rows, binaries = _export(graphs, options, choice and choice.bits, progress)
    compared = [] if subject is None else comparison.compare(subject, options.graphs, progress)
    videos = dict[whole_video.Replay, VideoRow]()
    for replay in replays:
        row = whole_video.generate(replay, program, exported, options.graphs, calibration, options.whole_videos)
        videos[replay], lowest = row, min(row.latents_db.values())
        progress(f'whole videos, {replay.graphs} on the {replay.runner}: {lowest:.1f} dB')
    progress.close()
    made_from = _made_from(options, program, calibration)
    made_from['keys_and_values'] = None if choice is None else dataclasses.asdict(choice)
    report = Report(rows, list(videos.values()), made_from, binaries, compared, calibration.resources, warnings)
    report.write(options.graphs.out)
    if phone_bundle.is_complete(program):
        phone_bundle.write(program, exported, options, calibration, videos.get(whole_video.ALL_ON_CPU))
    return report


def _export(
    graphs: Sequence[RecordedGraph], options: ExportOptions, bits: int | None, on_step: OnStep
) -> tuple[list[ExportedGraph], list[Row], list[SharedBinary]]:
    """Export, compile and measure graphs; those of the shared binary are compiled together after the last one.

    Args:
      bits: bits of the denoiser's keys and values; None if no stage is quantized.
    """
    shared, waiting = options.graphs.shared(options.names), list[tuple[ExportedGraph, float]]()
    exported, rows, binaries = list[ExportedGraph](), list[Row](), list[SharedBinary]()
    for recorded in graphs:
        exported.append(graph.export_graph(recorded, options.graphs, bits, on_step))
        ready = [(exported[-1], check_float(exported[-1], options.graphs, on_step))]
        if recorded.name in shared:
            waiting += ready
            if len(waiting) < len(shared):
                continue
            ready = waiting
            binaries = shared_binary.compile_stages([stage for stage, _ in ready], options.graphs, on_step)
        else:
            graph.compile_separately(exported[-1], options.graphs, on_step)
        for finished, onnx_db in ready:
            rows += measure(finished, onnx_db, options.graphs, on_step)
    return exported, rows, binaries


def _protocol(options: ExportOptions, program: PhoneProgram) -> Protocol:
    """Return the protocol of the calibration set; the number of videos follows from the samples unless it is given."""
    recorded = {name: options.graphs.samples_of(name) if name in options.names else 0 for name in program.calls}
    videos = options.videos or videos_needed(program.calls, recorded)
    keep = {name: min(program.calls[name], -(-count // max(videos, 1))) for name, count in recorded.items()}
    videos, validation = (videos, options.validation) if any(keep.values()) else (0, Scenes(()))
    plan = options.program.plan
    scenes = (options.scenes, validation, options.evaluation)
    return Protocol(program.weights, *scenes, plan, keep, videos, recorded_by())


def _steps(options: ExportOptions, calibration: CalibrationSet) -> int:
    """Return the number of reported steps, without whole videos."""
    shared = options.graphs.shared(options.names)
    steps = calibration.videos + key_value_bits.steps_of(options)
    steps += sum(graph.steps_of(name, options.graphs, name in shared) for name in options.names)
    return steps + shared_binary.steps_of(shared, options.graphs) + comparison.GRAPHS * options.graphs.compare


def warnings_of(protocol: Protocol) -> list[str]:
    """Return one line for each reason why the ratios may not hold for other prompts."""
    warnings = []
    prompts, evaluated = min(protocol.videos, len(protocol.scenes.prompts)), len(protocol.evaluation.prompts)
    if 0 < prompts < FEWEST_CALIBRATION_PROMPTS:
        warnings.append(
            f'Calibrated on {prompts} prompt(s) only: the ranges may not hold for others. Calibrate on at least '
            f'{FEWEST_CALIBRATION_PROMPTS} (--prompts, --prompts-file).'
        )
    if prompts and (validated := len(protocol.validation.prompts)) < FEWEST_VALIDATION_PROMPTS:
        warnings.append(
            f'Settings are chosen on {validated} prompt(s) only: others may be farther from JAX. Hold out at least '
            f'{FEWEST_VALIDATION_PROMPTS} (--validation-prompts) of at least {3 * FEWEST_VALIDATION_PROMPTS}.'
        )
    if evaluated < FEWEST_EVALUATION_PROMPTS:
        warnings.append(
            f'Evaluated on {evaluated} prompt(s) only: others may be farther from JAX. Evaluate on at least '
            f'{FEWEST_EVALUATION_PROMPTS} (--evaluation-prompts).'
        )
    return warnings


def safety_warnings(root: str | os.PathLike[str]) -> list[str]:
    """Return a line if a checkpoint has a safety checker, which is not exported."""
    if not has_checker(root):
        return []
    return [
        f'The safety checker of {root} is not exported: JAX makes refused frames black, the exported graphs show them. '
        'Check prompts and frames in the app.'
    ]


def _made_from(options: ExportOptions, program: PhoneProgram, calibration: CalibrationSet) -> dict[str, object]:
    """Return the inputs and settings of the export, for the report."""
    height, width = options.program.size
    return {
        'checkpoint': str(options.program.root),
        'mode': options.program.mode,
        'chipsets': [target.chipset for target in options.graphs.targets],
        'frames': options.program.frames,
        'height': height,
        'width': width,
        'weights_sha256': dict(program.weights),
        'calibration_sha256': calibration.sha256,
        'calibration_videos': calibration.protocol.videos,
        'calibration_samples': {name: options.graphs.samples_of(name) for name in options.names},
        'validation_prompts': list(calibration.protocol.validation.prompts),
        'evaluation_prompts': list(calibration.protocol.evaluation.prompts),
        'evaluation_samples': options.graphs.evaluation_samples,
        'simulated_samples': options.graphs.simulated_samples,
        **made_by(__name__),
    }
