"""Tokenize prompts, the training data of the text distillation.

    python -m train.prompts --checkpoint CKPT --file prompts.txt --out PROMPTS

A sample holds ids [L] and text_mask [L] of the T5 tokenizer, clip_l_ids and clip_g_ids [77], and the prompt. Run the
same command again to resume.

Legend: L T5 tokens (128).
Source: Neodragon, arXiv 2511.06055, section on the text encoder: its distillation needs prompts only.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from neodragon_jax.base.command_line import PathOption, add_checkpoint, command_parser, exit_status
from neodragon_jax.base.output import output_folder
from neodragon_jax.base.progress import ProgressBar
from neodragon_jax.evaluation.prompt_files import read_prompts
from neodragon_jax.generation.tokens import Tokenizers, cut_notice
from train.data import ArraySpec, RecordSpec, SampleWriter
from train.data.conditioning import token_ids

# Tokenizers are faster on many texts at once.
PROMPTS_AT_ONCE = 256


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = command_parser(
        'python -m train.prompts',
        'Tokenize prompts with the three tokenizers of a checkpoint: the training data of train.text.',
        'example:\n  python -m train.prompts --checkpoint CKPT --file prompts.txt --out PROMPTS',
    )
    add = parser.add_argument
    add_checkpoint(add)
    add('--file', action=PathOption, bucket=True, required=True, metavar='FILE',
        help='prompts as text, JSON, JSONL or CSV; empty, unreadable and repeated ones are left out')  # fmt: skip
    add('--out', action=PathOption, bucket=True, required=True, metavar='DIR', help='folder of the tokens')
    add('--prompt-modifier', default='', metavar='TEXT', help='text appended to every prompt (default: none)')
    add('--samples-per-shard', type=int, default=65536, metavar='N', help='samples per file (default: %(default)s)')
    return parser.parse_args(argv)


def records(
    tokenizers: Tokenizers, prompts: Sequence[str], indices: Sequence[int], modifier: str
) -> Iterator[dict[str, Any]]:
    """Yield the samples of some prompts, in order."""
    for start in range(0, len(indices), PROMPTS_AT_ONCE):
        batch = indices[start : start + PROMPTS_AT_ONCE]
        arrays = token_ids(tokenizers, [prompts[index] + modifier for index in batch])
        for row, index in enumerate(batch):
            yield {'index': index, 'prompt': prompts[index]} | {name: array[row] for name, array in arrays.items()}


def run(args: argparse.Namespace) -> None:
    """Write the missing tokens of a command line.

    Raises:
      InputError: an argument, the checkpoint or the folder is not usable.
    """
    left_out = collections.Counter[str]()
    file, out = args.file, args.out
    prompts = read_prompts(file, '--file', left_out)
    with output_folder(out):
        write_tokens(args, prompts)
    for reason, count in left_out.most_common():
        print(f'{count:8} lines left out: {reason}')


def write_tokens(args: argparse.Namespace, prompts: Sequence[str]) -> None:
    """Write the missing tokens of some prompts."""
    out, tokenizers = args.out, Tokenizers.load(args.checkpoint)
    notice = cut_notice(tokenizers.t5, prompts, args.prompt_modifier)
    print(notice, end='\n' if notice else '')
    example = token_ids(tokenizers, prompts[:PROMPTS_AT_ONCE])
    protocol = {
        'prompt_modifier': args.prompt_modifier,
        'prompts': hashlib.sha256('\n'.join(prompts).encode()).hexdigest()[:16],
        # Tokenizers are identified by their tokens of the first prompts.
        'tokenizers': hashlib.sha256(b''.join(array.tobytes() for array in example.values())).hexdigest()[:16],
    }
    spec = RecordSpec({name: ArraySpec(array.shape[1:], 'int32') for name, array in example.items()})
    options = {'samples_per_shard': args.samples_per_shard, 'name': 'prompts'}
    with SampleWriter(out, spec, len(prompts), protocol=protocol, **options) as writer:
        missing = writer.missing()
        made = records(tokenizers, prompts, missing, args.prompt_modifier)
        for record in ProgressBar(made, total=len(missing), unit='prompt'):
            writer.append(record)
    print(f'{out}: {len(prompts)} prompts, {len(missing)} of them written now')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(parse_args(argv)))


if __name__ == '__main__':
    sys.exit(main())
