"""Run a bundle on a phone: push, recorded calls, one video, pull.

The runner of export/player/cpp does the work on the phone; it prints one line per load, run and ratio.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from export.host.file_records import damage
from export.measure.snr import snr_db
from export.phone.adb import Phone
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import checked, read_json

FOLDER = '/data/local/tmp/neodragon'
RUNNER = 'neodragon_runner'
CPU = 'cpu'
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
    """Return the manifest of a bundle after checking all files against it.

    Raises:
      InputError: the folder is no bundle, or a file is damaged.
    """
    path = folder / 'manifest.json'
    if not path.is_file():
        raise InputError(f'{folder}: not a bundle. Give the folder that holds manifest.json.')
    manifest = read_json(path, dict[str, Any])
    harm = damage(folder, checked(manifest.get('files'), dict[str, dict[str, Any]], str(path), 'files'))
    if harm is not None:
        raise InputError(f'{folder}: {harm}. Export the bundle again.')
    return manifest


def measure(phone: Phone, bundle: pathlib.Path, runtime: pathlib.Path, chipset: str | None, runs: int) -> Measured:
    """Run a bundle on a phone.

    Args:
      runtime: folder of the runner, built for the phone, and of the libraries that it loads.
      chipset: chipset of the binaries to run; CPU runs the portable graphs; None queries the phone.
      runs: runs of each recorded call.
    Raises:
      InputError: the bundle, the runner or the phone is unsuitable, or a graph computes another result.
    """
    manifest = read_bundle(bundle)
    if not (runtime / RUNNER).is_file():
        raise InputError(f'--runtime {runtime}: has no {RUNNER}. Build export/player/cpp for the phone.')
    phone.check()
    chosen = chipset or phone.shell('getprop', 'ro.soc.model').strip().lower()
    if chosen != CPU and chosen not in manifest['chipsets']:
        known = ', '.join(manifest['chipsets'])
        raise InputError(f'{bundle}: the phone is {chosen}, the bundle is for {known}. Export with --soc {chosen}.')
    _push(phone, bundle, _needed(manifest, chosen), runtime)
    before = _celsius(phone)
    output = phone.script(
        f'cd {FOLDER} && LD_LIBRARY_PATH=. ADSP_LIBRARY_PATH=. ./{RUNNER} bundle out {chosen} {int(runs)} 2>&1'
    )
    after = _celsius(phone)
    ratio = _last_frame_db(phone, bundle, manifest['vectors']['video']['latents'])
    model = phone.shell('getprop', 'ro.product.model').strip()
    return Measured(model, chosen, read_output(output), ratio, (before, after))


def _last_frame_db(phone: Phone, bundle: pathlib.Path, entry: Mapping[str, Any]) -> float:
    """Return the ratio of the last latent frame of the video that the phone has made.

    Args:
      entry: file and shape of the expected latents, from the manifest.
    Raises:
      InputError: the latents have another size.
    """
    with tempfile.TemporaryDirectory() as folder:
        pulled = pathlib.Path(folder) / 'latents.bin'
        phone.pull(f'{FOLDER}/out/latents.bin', pulled)
        latents = np.fromfile(pulled, '<f4')
    expected = np.fromfile(bundle / entry['file'], '<f4').reshape(entry['shape'])
    if latents.size != expected.size:
        raise InputError(
            f'{phone.serial}: the runner gives {latents.size} numbers, not {expected.size}. Build it again.'
        )
    return snr_db(expected[-1], latents.reshape(expected.shape)[-1])


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


def _needed(manifest: Mapping[str, Any], chipset: str) -> list[str]:
    """Return the files that the runner reads."""
    other = 'portable/' if chipset != CPU else 'binaries/'
    binaries = {
        path
        for binary in manifest['binaries']
        if binary['chipset'] != chipset
        for path in (binary['file'], *(entry['wrapper'] for entry in binary['graphs'].values()))
    }
    return [name for name in manifest['files'] if not name.startswith(other) and name not in binaries]


def _push(phone: Phone, bundle: pathlib.Path, names: list[str], runtime: pathlib.Path) -> None:
    """Copy the required files to the phone, and compare the copies with the hashes of the manifest."""
    folders = sorted({str(pathlib.PurePosixPath('bundle', name).parent) for name in names})
    phone.shell('mkdir', '-p', *(f'{FOLDER}/{folder}' for folder in folders))
    for path in sorted(path for path in runtime.iterdir() if path.is_file()):
        phone.push(path, f'{FOLDER}/{path.name}')
    phone.shell('chmod', '755', f'{FOLDER}/{RUNNER}')
    for name in (*names, 'manifest.json'):
        phone.push(bundle / name, f'{FOLDER}/bundle/{name}')
    records = read_json(bundle / 'manifest.json', dict[str, Any])['files']
    for name in names:
        digest = phone.shell('sha256sum', f'{FOLDER}/bundle/{name}').split()[0]
        if digest != records[name]['sha256']:
            raise InputError(f'{phone.serial}: {name} arrived damaged. Check the cable and run again.')


def _celsius(phone: Phone) -> float | None:
    """Return the highest temperature of the phone's sensors, or None if it shows none."""
    output = phone.script('cat /sys/class/thermal/thermal_zone*/temp 2>/dev/null || true')
    numbers = [float(word) / 1000 for word in output.split() if re.fullmatch(r'-?\d+', word)]
    # Unused sensors report nonsense.
    plausible = [number for number in numbers if 0 < number < 150]
    return max(plausible, default=None)
