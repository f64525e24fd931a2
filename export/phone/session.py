"""Run a bundle on a phone: copy, recorded calls, one video, pull.

The runner of export/player/cpp does the work on the phone; it prints one line per load, run and ratio.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from export.host.file_records import damage, digest_line
from export.measure.snr import snr_db
from export.phone.adb import Phone
from export.phone.copies import CPU, Copy, runner_files, runner_graphs, synchronize
from export.qnn.chipsets import find_target
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.files import file_sha256
from neodragon_jax.base.json_file import checked, read_json

FOLDER = '/data/local/tmp/neodragon'
RUNNER = 'neodragon_runner'
# The runner loads them by name; stub and skel depend on the phone.
_QNN_LIBRARIES = ('libonnxruntime_providers_qnn.so', 'libQnnHtp.so', 'libQnnSystem.so')
_LINE = re.compile(r'(load|run|canary) (\S+) (-?[0-9.]+)')


@dataclasses.dataclass(frozen=True)
class GraphTimes:
    """One graph on a phone.

    Attributes:
      ratio_db: of the recorded call, against JAX.
      load_ms: time to load.
      run_ms: time of each run.
    """

    ratio_db: float
    load_ms: float
    run_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Median of the runs."""
        return statistics.median(self.run_ms)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A bundle on a phone.

    Attributes:
      model: of the phone.
      chipset: chipset of the binaries that ran, or CPU.
      graphs: by name.
      latents_db: of the last latent frame of the recorded video, against JAX.
      celsius: highest temperature of all sensors, before and after.
    """

    model: str
    chipset: str
    graphs: Mapping[str, GraphTimes]
    latents_db: float
    celsius: tuple[float | None, float | None]


def read_bundle(folder: pathlib.Path) -> dict[str, Any]:
    """Return the manifest of a bundle after checking it against its digest, and all files against it.

    Raises:
      InputError: the folder is no bundle, or a file is damaged.
    """
    path, digest = folder / 'manifest.json', folder / 'manifest.json.sha256'
    if not path.is_file():
        raise InputError(f'{folder}: not a bundle. Give the folder that holds manifest.json.')
    if not digest.is_file() or digest.read_bytes() != digest_line(path).encode():
        raise InputError(f'{path}: differs from {digest.name}. Export the bundle again.')
    manifest = read_json(path, dict[str, Any])
    harm = damage(folder, checked(manifest.get('files'), dict[str, dict[str, Any]], str(path), 'files'))
    if harm is not None:
        raise InputError(f'{folder}: {harm}. Export the bundle again.')
    return manifest


def measure(
    phone: Phone,
    bundle: pathlib.Path,
    runtime: pathlib.Path,
    chipset: str | None,
    runs: int,
    report: Callable[[str], object] = lambda line: None,
) -> Measured:
    """Run a bundle on a phone.

    Args:
      runtime: folder of the runner, built for the phone, and of the libraries that it loads.
      chipset: chipset of the binaries to run; CPU runs the portable graphs; None queries the phone.
      runs: runs of each recorded call.
      report: takes lines of progress: checks, groups of files that are copied, and those of the runner as they come.
    Raises:
      InputError: the bundle, the runner or the phone is unsuitable, or a graph or the video computes another result.
    """
    report(f'check the files of {bundle}')
    manifest = read_bundle(bundle)
    _check_files(runtime, [RUNNER], 'Build export/player/cpp for the phone')
    phone.check()
    chosen = _chosen(phone, bundle, manifest, chipset)
    if chosen != CPU:
        _check_files(runtime, _QNN_LIBRARIES, 'Copy the libraries of onnxruntime-qnn for the phone')
    # The folder on the phone holds nothing else: no file of another bundle or runtime, no output of another run.
    report(f'compare them with those on {phone.serial}')
    synchronize(phone, FOLDER, _copies(bundle, manifest, chosen, runtime), report)
    phone.shell('chmod', '755', f'{FOLDER}/{RUNNER}')
    before = _celsius(phone)
    command = f'LD_LIBRARY_PATH=. ADSP_LIBRARY_PATH=. ./{RUNNER} bundle out {chosen} {int(runs)} 2>&1'
    output = phone.script(f'cd {FOLDER} && {command}', report)
    after = _celsius(phone)
    graphs = read_output(output)
    for graph in runner_graphs(manifest):
        if graph not in graphs:
            raise InputError(f'{phone.serial}: the runner reports no times of {graph}. Build it again.')
    ratio = _last_frame_db(phone, bundle, manifest['vectors']['video'])
    model = phone.shell('getprop', 'ro.product.model').strip()
    return Measured(model, chosen, graphs, ratio, (before, after))


def _check_files(runtime: pathlib.Path, names: Sequence[str], remedy: str) -> None:
    """Raise InputError unless the folder of the runtime has files."""
    for name in names:
        if not (runtime / name).is_file():
            raise InputError(f'--runtime {runtime}: has no {name}. {remedy}.')


def _chosen(phone: Phone, bundle: pathlib.Path, manifest: Mapping[str, Any], given: str | None) -> str:
    """Return the chipset whose binaries run, as the bundle names it, or CPU.

    Args:
      given: option --chipset; None queries the phone, whose name of the chipset may carry a grade.
    Raises:
      InputError: the phone does not name its chipset, the name is unknown, or the bundle has no binaries for it.
    """
    name = given or phone.shell('getprop', 'ro.soc.model').strip()
    if not name:
        raise InputError(
            f'{phone.serial}: the phone does not name its chipset (ro.soc.model is empty). Name it with --chipset.'
        )
    if name.lower() in (CPU, *manifest['chipsets']):
        return name.lower()
    chosen = find_target(name).chipset
    if chosen not in manifest['chipsets']:
        known = ', '.join(manifest['chipsets']) or 'no chipset'
        subject = f'--chipset is {given}' if given else f'the phone is {name}'
        raise InputError(f'{bundle}: {subject}, the bundle is for {known}. Export with --soc {chosen}.')
    return chosen


def _copies(bundle: pathlib.Path, manifest: Mapping[str, Any], chipset: str, runtime: pathlib.Path) -> dict[str, Copy]:
    """Return the files of a run by their path in the folder on the phone."""
    libraries = sorted(path for path in runtime.iterdir() if path.is_file())
    copies = {path.name: Copy(path, file_sha256(path)) for path in libraries}
    for name in runner_files(manifest, chipset):
        copies[f'bundle/{name}'] = Copy(bundle / name, manifest['files'][name]['sha256'])
    path = bundle / 'manifest.json'
    return copies | {'bundle/manifest.json': Copy(path, file_sha256(path))}


def _last_frame_db(phone: Phone, bundle: pathlib.Path, video: Mapping[str, Any]) -> float:
    """Return the ratio of the last latent frame of the video that the phone has made.

    Args:
      video: the recorded video, from the manifest.
    Raises:
      InputError: the latents have another size, or the ratio is below the recorded minimum.
    """
    entry, minimum = video['latents'], video.get('minimum_db')
    with tempfile.TemporaryDirectory() as folder:
        pulled = pathlib.Path(folder) / 'latents.bin'
        phone.pull(f'{FOLDER}/out/latents.bin', pulled)
        latents = np.fromfile(pulled, '<f4')
    expected = np.fromfile(bundle / entry['file'], '<f4').reshape(entry['shape'])
    if latents.size != expected.size:
        raise InputError(
            f'{phone.serial}: the runner gives {latents.size} numbers, not {expected.size}. Build it again.'
        )
    reached = snr_db(expected[-1], latents.reshape(expected.shape)[-1])
    if minimum is not None and not reached >= minimum:
        raise InputError(
            f'{phone.serial}: the recorded video comes out at {reached:.1f} dB, not {minimum:.1f}: this runtime or '
            'chip computes something else. Update the libraries of --runtime, or run with --chipset cpu.'
        )
    return reached


def read_output(output: str) -> dict[str, GraphTimes]:
    """Return the measurements in the runner's output, by graph."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for kind, graph, number in _LINE.findall(output):
        found[graph][kind].append(float(number))
    complete = {
        graph: lines for graph, lines in found.items() if all(lines[kind] for kind in ('load', 'run', 'canary'))
    }
    return {
        graph: GraphTimes(lines['canary'][-1], lines['load'][-1], tuple(lines['run']))
        for graph, lines in complete.items()
    }


def _celsius(phone: Phone) -> float | None:
    """Return the highest temperature of the phone's sensors, or None if it shows none."""
    output = phone.script('cat /sys/class/thermal/thermal_zone*/temp 2>/dev/null || true')
    numbers = [float(word) / 1000 for word in output.split() if re.fullmatch(r'-?\d+', word)]
    # Unused sensors report nonsense.
    plausible = [number for number in numbers if 0 < number < 150]
    return max(plausible, default=None)
