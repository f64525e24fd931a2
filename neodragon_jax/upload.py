"""Upload a distilled student to the Hugging Face hub with a model card. Run with --help."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from neodragon_jax.base.bucket import StoragePath, check_bucket, is_bucket, staged
from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import folders, hub, model_card

EXAMPLES = """
examples:
  look at the card first:
    python -m neodragon_jax.upload RUN/result --to ORG/NAME --dry-run
  of a run on a pod, in a bucket:
    python -m neodragon_jax.upload gs://BUCKET/RUN/result --to ORG/NAME --dry-run
  then upload (log in once with: hf auth login):
    python -m neodragon_jax.upload RUN/result --to ORG/NAME --private
"""


@dataclasses.dataclass(frozen=True)
class UploadOptions:
    """Options of this command."""

    student: StoragePath
    to: hub.HubName
    license: str
    private: bool
    dry_run: bool


def parse_options(argv: Sequence[str] | None = None) -> UploadOptions:
    """Return the options of a command line.

    Raises:
      InputError: the name is not one of the hub, or the path is not local.
    """
    parser = command_parser(
        'python -m neodragon_jax.upload',
        'Upload the result of train.dmd to the Hugging Face hub, with a model card of protocol, recipe and metrics.',
        EXAMPLES,
    )
    add = parser.add_argument
    add('student', action=PathOption, bucket=True, metavar='STUDENT_DIR',
        help='result of a distillation, such as RUN/result')  # fmt: skip
    add('--to', required=True, metavar='ORG/NAME', help='repository; it is made if it does not exist')
    add('--license', default='other', metavar='NAME', help='license, as the hub names it (default: %(default)s)')
    add('--private', action='store_true', help='make a new repository private')
    add('--dry-run', action='store_true', help='print the model card and upload nothing')
    args = parser.parse_args(argv)
    name = hub.parse(args.to)
    if name is None or name.revision:
        raise InputError(f'--to {args.to}: not a repository of the hub; write ORG/NAME.')
    return UploadOptions(args.student, name, args.license, args.private, args.dry_run)


def run(options: UploadOptions) -> None:
    """Upload a student, or print its card."""
    if is_bucket(options.student):
        check_bucket(options.student, 'STUDENT_DIR')
    record, metrics = model_card.read_record(options.student), model_card.read_metrics(options.student)
    card = model_card.write_card(options.to.repository, record, metrics, options.license)
    if options.dry_run:
        print(card)
        return
    local = staged(options.student, 'STUDENT_DIR', (folders.STUDENT, folders.STUDENT_ADAPTER))
    commit = hub.upload_student(local, options.to, card, options.private)
    print(f'Uploaded. Use it with --student {options.to}@{commit}')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(parse_options(argv)))


if __name__ == '__main__':
    sys.exit(main())
