"""The report on a folder of videos: a row per file, and a summary of the reasons."""

from __future__ import annotations

import collections
import csv
import pathlib
import re
from collections.abc import Mapping, Sequence

from neodragon_jax.base.atomic import atomic_file
from train.data.captions import readable
from train.data.inspection import Verdict

REPORT = 'report.tsv'
ROWS_SHOWN = 20


def write_report(path: pathlib.Path, verdicts: Sequence[Verdict]) -> None:
    """Write one line per file: its name, number of clips, size, and the reason if it is left out."""
    with atomic_file(path) as partial, partial.open('w', encoding='utf-8', newline='') as file:
        table = csv.writer(file, delimiter='\t', lineterminator='\n')
        table.writerow(['file', 'clips', 'size', 'reason'])
        for verdict in verdicts:
            size = 'x'.join(map(str, verdict.size or ()))
            table.writerow([readable(verdict.file), len(verdict.clips), size, verdict.reason])


def print_summary(out: pathlib.Path, verdicts: Sequence[Verdict], counts: Mapping[str, int]) -> None:
    """Print the number of clips of each size, and of files left out by reason, with the first of these files."""
    for name, count in counts.items():
        print(f'{out / name}: {count} clips')
    rejected = [verdict for verdict in verdicts if verdict.reason]
    if not rejected:
        return
    # Reasons that differ only in numbers are counted together; BT.709 and P3 are names.
    kinds = collections.Counter(re.sub(r'(?<![\w.])\d[\d.x]*', 'N', verdict.reason) for verdict in rejected)
    print(f'left out: {len(rejected)} of {len(verdicts)}, all in {out / REPORT}')
    for kind, count in kinds.most_common():
        print(f'{count:8}  {kind}')
    width = max(len(readable(verdict.file)) for verdict in rejected[:ROWS_SHOWN])
    for verdict in rejected[:ROWS_SHOWN]:
        print(f'{readable(verdict.file):{width}}  {verdict.reason}')
    if len(rejected) > ROWS_SHOWN:
        print(f'... and {len(rejected) - ROWS_SHOWN} more')
