"""Command line: run a bundle on a connected phone. See `python -m export.device --help`."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from export.phone.adb import Phone
from export.phone.session import measure
from export.phone.table import write
from neodragon_jax.base.atomic import check_writable
from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.errors import InputError

EXAMPLES = """
example:
  python -m export.device phone/bundle --serial R5CX10ABCDE --runtime RUNTIME

RUNTIME holds neodragon_runner, built from export/player/cpp with the Android NDK, and the libraries that it loads:
libonnxruntime.so of onnxruntime for Android, and of onnxruntime-qnn, a plugin since its version 2.0, the libraries
libonnxruntime_providers_qnn.so, libQnnHtp.so, libQnnSystem.so, and stub and skel of the phone's HTP, such as
libQnnHtpV79Stub.so and libQnnHtpV79Skel.so. They may not be older than the bundle's `minimum_runtime` and `qnn_sdk`.
"""


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """Options of this command.

    Attributes:
      bundle: folder.
      phone: the phone that runs it.
      runtime: folder of the runner and its libraries.
      chipset: chipset of the binaries to run, or 'cpu'; None queries the phone.
      runs: runs of each recorded call.
      out: folder of the table.
    """

    bundle: pathlib.Path
    phone: Phone
    runtime: pathlib.Path
    chipset: str | None
    runs: int
    out: pathlib.Path


def parse_options(argv: Sequence[str] | None = None) -> DeviceOptions:
    """Return the options of a command line."""
    description = 'Copy a bundle to a phone with adb, check its recorded calls, and measure SNR and latencies.'
    parser = command_parser('python -m export.device', description, EXAMPLES)
    add = parser.add_argument
    add('bundle', action=PathOption, metavar='BUNDLE_DIR', help='OUT/bundle of an export')
    add('--serial', required=True, metavar='SERIAL', help='phone, as `adb devices` lists it')
    add('--runtime', action=PathOption, required=True, metavar='DIR', help='runner and libraries for the phone')
    add('--chipset', metavar='NAME',
        help="chipset of the binaries to run, or cpu for the portable graphs (default: the phone's)")  # fmt: skip
    add('--runs', type=int, default=10, metavar='N', help='runs of each recorded call (default: %(default)s)')
    add('--out', action=PathOption, metavar='DIR', help='folder of device-CHIPSET.md (default: beside the bundle)')
    add('--adb', default='adb', metavar='PROGRAM', help='adb program (default: %(default)s)')
    given = parser.parse_args(argv)
    if given.runs < 1:
        raise InputError(f'--runs is {given.runs}; give at least 1.')
    out = given.out or given.bundle.resolve().parent
    chipset = given.chipset and given.chipset.lower()
    return DeviceOptions(given.bundle, Phone(given.serial, given.adb), given.runtime, chipset, given.runs, out)


def run(options: DeviceOptions) -> None:
    """Measure, and write the table."""
    check_writable(options.out)
    progress = lambda line: print(line, flush=True)
    measured = measure(options.phone, options.bundle, options.runtime, options.chipset, options.runs, progress)
    path = write(options.out, measured)
    print(path.read_text(encoding='utf-8'), end='')
    print(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(parse_options(argv)))


if __name__ == '__main__':
    sys.exit(main())
