"""The glossary of metrics, docs/reference/metrics.md, as a test of logged names."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from support.goldens import ROOT

# Placeholders of the page in the names of metrics. METRIC stands for another name of the page.
PLACEHOLDERS = {'stageS': r'stage\d+', 'unitU': r'unit\d+', 'blockB': r'block\d+', 'NAME': r'\w+'}


@functools.cache
def pattern() -> re.Pattern[str]:
    """Return the pattern of all names in the first columns of the page's tables."""
    text = (ROOT / 'docs' / 'reference' / 'metrics.md').read_text()
    cells = [line.split('|')[1] for line in text.splitlines() if line.startswith('| `')]
    names = [re.escape(name) for cell in cells for name in re.findall('`([^`]+)`', cell)]
    for word, meaning in PLACEHOLDERS.items():
        names = [name.replace(word, meaning) for name in names]
    plain = '|'.join(name for name in names if 'METRIC' not in name)
    of_others = [name.replace('METRIC', f'({plain})') for name in names if 'METRIC' in name]
    return re.compile('|'.join([plain, *of_others]))


def unexplained(names: Iterable[str]) -> list[str]:
    """Return the names that the glossary does not have."""
    return sorted({name for name in names if not pattern().fullmatch(name)})
