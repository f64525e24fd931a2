"""Command line: a bundle and a prompt in, a video out. Run `python -m neodragon_phone --help`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

from neodragon_phone.backends import NAMES, exit_process, open_backend
from neodragon_phone.bundle import Bundle
from neodragon_phone.chipsets import detect_chipset
from neodragon_phone.errors import BundleError
from neodragon_phone.frames import check_encoder, write_video
from neodragon_phone.generation import Request, check_video, generate, given_frame
from neodragon_phone.manifest import Manifest
from neodragon_phone.output import check_output, written
from neodragon_phone.player import Player, lines_of_times

CANARIES = ('graphs', 'video', 'none')

EXAMPLES = """
examples:
  on any machine, with the portable graphs:
    python -m neodragon_phone bundle --prompt "a small red circle moves right on a blue background" --out video.mp4

  on a Snapdragon machine that runs Python (a laptop, or Linux), with the context binaries:
    python -m neodragon_phone bundle --prompt "..." --out video.mp4 --backend htp --chipset sc8380xp

  check a bundle and a machine without making a video:
    python -m neodragon_phone bundle --canary video

An Android app does not run Python: it uses the C++ of export/player/cpp, see "In an Android app" in docs/bundle.md.

exit status: 0 done, 2 wrong input: the line on standard error names the bundle, option or machine and the remedy
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of this command.

    Attributes:
      bundle: folder.
      request: the video; None checks the bundle only.
      out: mp4 file.
      backend: of `backends.NAMES`.
      chipset: chipset of the binaries to run, or to simulate; None detects it.
      canary: of CANARIES.
      report: JSON file of times and ratios; None writes none.
    """

    bundle: pathlib.Path
    request: Request | None
    out: pathlib.Path
    backend: str
    chipset: str | None
    canary: str
    report: pathlib.Path | None


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        'python -m neodragon_phone',
        description='Turn a prompt into a video with a Neodragon phone bundle.',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('bundle', type=pathlib.Path, help='folder that holds manifest.json')
    add('--prompt', metavar='TEXT', help='content of the video; without it, the bundle is only checked')
    add('--out', type=pathlib.Path, default=pathlib.Path('video.mp4'), metavar='FILE',
        help='mp4 file of the video (default: %(default)s)')  # fmt: skip
    add('--image', type=pathlib.Path, metavar='FILE', help='first frame, PNG or JPEG, resized to the video')
    add('--seed', type=int, default=0, metavar='N', help='from 0 to 2^64 - 1 (default: %(default)s)')
    add('--backend', choices=NAMES, default='cpu',
        help='cpu: portable graphs; htp: context binaries on this machine; simulator: portable graphs on the HTP '
        'simulator of onnxruntime-qnn, x86 Linux (default: %(default)s)')  # fmt: skip
    add('--chipset', metavar='NAME', help='such as sm8750 (default: this machine; simulator: first of the bundle)')
    add('--canary', choices=CANARIES, default='graphs',
        help='graphs: run the recorded call of each graph before it is used; video: make the recorded video first; '
        'none: check hashes and versions only (default: %(default)s)')  # fmt: skip
    add('--report', type=pathlib.Path, metavar='FILE',
        help='write times and SNR (signal-to-noise ratio) of all graphs as JSON')  # fmt: skip
    given = parser.parse_args(argv)
    request = None if given.prompt is None else Request(given.prompt, given.seed, given.image)
    return Options(given.bundle, request, given.out, given.backend, given.chipset, given.canary, given.report)


def run(options: Options) -> None:
    """Check outputs and bundle, then make the video."""
    _check_outputs(options)
    place = (options.chipset or detect_chipset()) if options.backend == 'htp' else None
    bundle = Bundle.open(options.bundle, place)
    request = options.request
    if request is not None:  # a wrong picture is reported before graphs are loaded
        request = dataclasses.replace(request, image=given_frame(bundle.manifest, request.image))
    print(f'{bundle.manifest["name"]}: {len(bundle.verified)} files verified')
    print(_safety_note(bundle.manifest))
    for phase in bundle.manifest['phases']:
        print(f'  memory of phase {phase["name"]}: {phase["bytes"].get(bundle.place, 0) / 1e6:.0f} MB')
    backend = open_backend(options.backend, bundle, options.chipset)
    player = Player(bundle, backend, report=lambda line: print(line, flush=True), check_graphs=options.canary != 'none')
    if options.canary != 'none':
        player.check_all()
    if options.canary == 'video':
        print(f'recorded video: SNR {check_video(player):.1f} dB at its last latent frame')
    if request is not None:
        video = generate(player, request)
        write_video(options.out, video.frames, bundle.manifest['video']['frames_per_second'])
        print(options.out)
    print('\n'.join(lines_of_times(player.times)))
    if options.report is not None:
        _write_report(options.report, player)


def _safety_note(manifest: Manifest) -> str:
    """Return a line on unsafe content; bundles of before may not tell of a checker."""
    dropped = manifest.get('safety', {}).get('checkpoint_has_checker', False)
    reason = ": the checkpoint's safety checker is not part of the bundle." if dropped else '.'
    return f'Videos are not checked for unsafe content{reason}'


def _check_outputs(options: Options) -> None:
    """Raise BundleError unless all outputs can be written, before the minutes that a video takes."""
    outputs = {'--report': options.report}
    if options.request is not None:
        check_encoder()
        outputs['--out'] = options.out
    for option, path in outputs.items():
        if path is not None:
            check_output(path, option)
            _refuse_input(path, option, options)
    if len(outputs) > 1 and options.report is not None and options.report.absolute() == options.out.absolute():
        raise BundleError(f'--report {options.report}: the same file as --out. Give another --report.')


def _refuse_input(path: pathlib.Path, option: str, options: Options) -> None:
    """Raise BundleError if writing to a path would overwrite the bundle or the given picture."""
    image = None if options.request is None else options.request.image
    if options.bundle.resolve() in path.resolve().parents:
        raise BundleError(f'{option} {path}: it is in the bundle. Give another {option}.')
    if isinstance(image, pathlib.Path) and path.resolve() == image.resolve():
        raise BundleError(f'{option} {path}: it is the picture of --image. Give another {option}.')


def _write_report(path: pathlib.Path, player: Player) -> None:
    """Write times and ratios of all graphs."""
    graphs = {
        name: {'load_s': times.load, 'run_s': times.runs, 'canary_db': player.canary_db.get(name)}
        for name, times in player.times.items()
    }
    with written(path, '--report') as draft:
        draft.write_text(json.dumps({'place': player.bundle.place, 'graphs': graphs}, indent=1) + '\n')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    try:
        run(parse_options(argv))
    except BundleError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    exit_process(main())
