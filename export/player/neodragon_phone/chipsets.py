"""Chipsets: that of this machine, and those of a bundle by all their names."""

from __future__ import annotations

import importlib
import platform
import re
import subprocess
from collections.abc import Mapping
from typing import Any

from neodragon_phone.errors import BundleError

_PROCESSOR = r'HARDWARE\DESCRIPTION\System\CentralProcessor\0'
# Model number of a Snapdragon X in a text such as `Snapdragon(R) X Elite - X1E80100 - Qualcomm(R) Oryon(TM) CPU`.
_MODEL = re.compile(r'\bX\d[A-Z0-9]{4,}\b')
# Speed grade and package at the end of a model number, such as in SM8750-AB; as in the exporter's chipsets.py.
_GRADE = re.compile(r'(?<=\d)(-[1-9])?-?(a[abc]|p)$')


def find_chipset(chipsets: Mapping[str, Any], name: str) -> str | None:
    """Return the chipset of a bundle with a name, or None.

    Args:
      chipsets: entry of the manifest.
      name: model number, also with a grade (`SM8750-AB`), or one of the `aliases`. Letter case does not matter.
    """
    names = {_plain(alias): key for key, entry in chipsets.items() for alias in (key, *entry.get('aliases', ()))}
    return names.get(_plain(name)) or names.get(_plain(_GRADE.sub('', name.strip().lower())))


def detect_chipset() -> str:
    """Return the model number of this machine's chipset, as the system names it.

    Raises:
      BundleError: it cannot be detected.
    """
    name = _windows_model() if platform.system() == 'Windows' else _android_model()
    if not name:
        raise BundleError('--backend htp: the chipset of this machine cannot be detected; name it with --chipset.')
    return name


def _windows_model() -> str:
    """Return the model number in the processor's name, which only the registry has, or ''."""
    registry = importlib.import_module('winreg')
    try:
        with registry.OpenKey(registry.HKEY_LOCAL_MACHINE, _PROCESSOR) as key:
            text, _ = registry.QueryValueEx(key, 'ProcessorNameString')
    except OSError:
        return ''
    found = _MODEL.search(str(text).upper())
    return found[0] if found else ''


def _android_model() -> str:
    """Return the model number that Android names, or ''."""
    try:
        return subprocess.run(['getprop', 'ro.soc.model'], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ''


def _plain(name: str) -> str:
    return re.sub(r'[\s_-]', '', name.lower())
