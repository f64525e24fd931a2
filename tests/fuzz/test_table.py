"""Tests of the table in README.md, and of the lock file that the table names."""

from __future__ import annotations

import pathlib
import re

TESTS = pathlib.Path(__file__).parents[1]


def test_every_kind_has_its_test():
    table = pathlib.Path(__file__).with_name('README.md').read_text()
    rows = re.findall(r'^\| [^|]+ \| `([\w/.]+)` `(\w+)` \|$', table, re.MULTILINE)
    assert len(rows) > 20
    for file, name in rows:
        assert f'def {name}(' in (TESTS / file).read_text(), f'{file} {name}'


def test_every_pin_of_the_lock_has_hashes():
    lock = (TESTS.parent / 'requirements.lock').read_text()
    pins = re.split(r'^(?=[A-Za-z0-9])', lock, flags=re.MULTILINE)[1:]
    assert len(pins) > 100
    for pin in pins:
        assert re.match(r'[\w.\[\]-]+==\S+', pin) and '--hash=sha256:' in pin, pin[:80]
