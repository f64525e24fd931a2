"""Model card of a distilled student: protocol, teacher, recipe and metrics, from the files of its training run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from neodragon_jax.base.bucket import StoragePath, is_bucket, staged
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import parse_json, read_json
from neodragon_jax.checkpoint import folders

RECORD = 'student.json'  # written by train.dmd beside the student
METRICS = 'metrics.jsonl'  # of the run, one folder up
CARD = 'README.md'

_HEAD = """\
---
library_name: neodragon_jax
pipeline_tag: text-to-video
license: {license}
tags: [text-to-video, jax, flax, neodragon, distillation]
---
# {title}

A few-step text-to-video denoiser, distilled with `python -m train.dmd` of neodragon_jax. It replaces the denoiser and
the context adapter of a checkpoint in the layout of Neodragon (arXiv 2511.06055):

```
python -m neodragon_jax --checkpoint CKPT --student hf://{title} --prompt "..." --out videos/
```
"""


def read_record(folder: StoragePath) -> dict[str, Any]:
    """Return the record of a student's training.

    Raises:
      InputError: the folder has no student, or its record is missing or damaged.
    """
    for name in (folders.STUDENT, folders.STUDENT_ADAPTER):
        if not (folder / name / 'config.json').is_file():
            raise InputError(f'{folder}: no {name} in it. Pass the folder of a student, such as RUN/result.')
    path = folder / RECORD
    if not path.exists():
        raise InputError(f'{path}: no such file; train.dmd writes it beside the student. Pass RUN/result.')
    return read_json(staged(path, 'STUDENT_DIR'), dict[str, Any])


def read_metrics(folder: StoragePath) -> dict[str, Any]:
    """Return the last metrics of the run that produced a student folder; {} if the run is not beside it."""
    whole = folder if is_bucket(folder) else folder.resolve()  # '.' has no parent
    path = whole.parent / METRICS
    if not path.is_file():
        return {}
    lines = path.read_bytes().decode('utf-8', 'replace').splitlines()
    for line in reversed(lines):
        try:
            return parse_json(line, dict[str, Any], str(path))
        except InputError:
            continue  # truncated when the run was killed
    return {}


def write_card(repository: str, record: Mapping[str, Any], metrics: Mapping[str, Any], license_name: str) -> str:
    """Return the model card in Markdown.

    Args:
      repository: ORG/NAME.
      record: from `read_record`; each entry that is an object becomes a table, all others form the recipe table.
      metrics: from `read_metrics`.
      license_name: identifier of the license on the hub.
    """
    plain = {key: value for key, value in record.items() if not isinstance(value, dict)}
    # Paths on the training machine are meaningless elsewhere.
    plain.pop('checkpoint', None)
    parts = [_HEAD.format(title=repository, license=license_name), _table('Recipe', plain)]
    parts += [_table(key.replace('_', ' ').capitalize(), value) for key, value in record.items() if key not in plain
              and isinstance(value, dict)]  # fmt: skip
    if metrics:
        parts.append(_table('Metrics at the end of training', metrics))
    return '\n'.join(parts)


def _table(title: str, values: Mapping[str, Any]) -> str:
    """Return a section with a table of names and values."""
    rows = [f'| {key} | {_cell(value)} |' for key, value in values.items()]
    return '\n'.join([f'## {title}', '', '| name | value |', '|---|---|', *rows, ''])


def _cell(value: Any) -> str:
    """Return a value as the text of a table's cell."""
    text = f'{value:.6g}' if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return ' '.join(text.replace('|', r'\|').split()) or '-'
