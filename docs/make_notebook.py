"""Write the notebook of a script in the percent format: cells begin with `# %%`, text cells with `# %% [markdown]`.

python docs/make_notebook.py docs/notebook/first_run.py

The notebook goes beside the script. Format: nbformat 4.5.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
from typing import Any

_TEXT = ' [markdown]'


def notebook(script: str) -> dict[str, Any]:
    """Return the notebook of a script as JSON values; the same script gives the same notebook."""
    parts = re.split(r'(?m)^# %%(.*)\n', script)
    if parts[0].strip():
        raise ValueError('the script has lines before its first "# %%"')
    marks, bodies = parts[1::2], parts[2::2]
    pairs = zip(marks, bodies, strict=True)
    cells = [_cell(number, mark == _TEXT, body.strip('\n')) for number, (mark, body) in enumerate(pairs)]
    kernel = {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}
    return {
        'cells': cells,
        'metadata': {'kernelspec': kernel, 'language_info': {'name': 'python'}},
        'nbformat': 4,
        'nbformat_minor': 5,
    }


def _cell(number: int, is_text: bool, body: str) -> dict[str, Any]:
    """Return a cell."""
    text = re.sub(r'(?m)^# ?', '', body) if is_text else body
    cell = {'id': f'cell-{number}', 'metadata': {}, 'source': text.splitlines(keepends=True)}
    if is_text:
        return {'cell_type': 'markdown', **cell}
    return {'cell_type': 'code', 'execution_count': None, 'outputs': [], **cell}


def text_of(script: str) -> str:
    """Return the notebook's file content."""
    return json.dumps(notebook(script), indent=1, ensure_ascii=False) + '\n'


def main() -> None:
    """Write the notebook of the script on the command line."""
    parser = argparse.ArgumentParser('docs/make_notebook.py', description='Write the notebook of a script.')
    parser.add_argument('script', type=pathlib.Path, help='file in the percent format')
    script = parser.parse_args().script
    script.with_suffix('.ipynb').write_text(text_of(script.read_text()))


if __name__ == '__main__':
    main()
