"""Chipsets that graphs are compiled for: names, QNN's SoC model numbers, and HTP versions.

Source of the numbers, HTP versions and VTCM sizes: the compiler of onnxruntime-qnn 2.7.0 writes them into a binary
(`soc_type=...;arch=...;vtcm_size=...`). One small W8A16 graph was compiled for every number from 36 to 111.
"""

from __future__ import annotations

import dataclasses
import mmap
import pathlib
import re

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.lists import comma_list

# QNN's older HTPs lack operations that the graphs need.
_OLDEST_ARCH = 73
_NUMBERS = re.compile(r'(?P<soc>\d{1,4}):v?(?P<arch>\d{2})')
# Suffix of the model number on a package or in Android's `ro.soc.model`: speed grade and package.
_GRADE = re.compile(r'(?<=\d)(-[1-9])?-?(a[abc]|p)$')
_BINARY = re.compile(rb'soc_type=(\w+);arch=(\d+);')


@dataclasses.dataclass(frozen=True)
class Target:
    """A chipset.

    Attributes:
      chipset: model number in lower case, as used in folder names.
      soc_model: QNN's number of the chipset.
      htp_arch: version of its HTP, such as 79 for v79.
      product: product name.
      vtcm_mb: size of the HTP's tightly coupled memory; 0 if unknown.
      aliases: further model numbers of the same chip.
    """

    chipset: str
    soc_model: int
    htp_arch: int
    product: str
    vtcm_mb: int = 0
    aliases: tuple[str, ...] = ()


_X1 = ('x1e001de', 'x1e00100', 'x1e78100', 'x1e80100', 'x1e84100', 'x1p64100', 'x1p66100', 'sc8380')
_X2 = ('x2e80100', 'x2e88100', 'x2e96100', 'sc8480')
TARGETS = {
    target.chipset: target
    for target in (
        Target('sm8850', 87, 81, 'Snapdragon 8 Elite Gen 5', 8),
        Target('sm8845', 97, 81, 'Snapdragon 8 Gen 5', 8),
        Target('sc8480xp', 88, 81, 'Snapdragon X2 Elite', 8, _X2),
        Target('sm8750', 69, 79, 'Snapdragon 8 Elite', 8),
        Target('sm8650', 57, 75, 'Snapdragon 8 Gen 3', 8),
        Target('sc8380xp', 60, 73, 'Snapdragon X Elite', 8, _X1),
        Target('sm8550', 43, 73, 'Snapdragon 8 Gen 2', 8),
        Target('sm8735', 85, 73, 'Snapdragon 8s Gen 4', 8),
        Target('sm8635', 68, 73, 'Snapdragon 8s Gen 3', 4),
        Target('sm7675', 70, 73, 'Snapdragon 7+ Gen 3', 4),
        Target('sm7750', 86, 73, 'Snapdragon 7 Gen 4', 4),
        Target('sm7550', 64, 73, 'Snapdragon 7 Gen 3', 2),
        Target('sm7635', 73, 73, 'Snapdragon 7s Gen 3', 2),
        Target('sm6650', 74, 73, 'Snapdragon 6 Gen 4', 2),
        Target('qcs8550', 66, 73, 'Dragonwing QCS8550', 8, ('qcm8550',)),
        Target('qcs9100', 77, 73, 'Dragonwing IQ9', 8),
        Target('qcs8300', 82, 75, 'Dragonwing IQ8', 8),
    )
}


def find_target(chipset: str) -> Target:
    """Return the target of a chipset.

    Args:
      chipset: a model number (`SM8750-AB`, `X1E-80-100`), a product name (`8 Elite`), or `NUMBER:ARCH`, QNN's number of
        the chip and the version of its HTP (`60:73`). Letter case does not matter.
    Raises:
      InputError: the name is unknown. There is no fallback to another chip, because its binaries would not load.
    """
    numbers = _NUMBERS.fullmatch(chipset.strip().lower())
    if numbers:
        return _by_number(int(numbers['soc']), int(numbers['arch']))
    names = _names()
    name = _plain(chipset)
    found = names.get(name) or names.get(_plain(_GRADE.sub('', chipset.strip().lower())))
    if found is not None:
        return found
    longer = [f'"{known}"' for known in names if name and known.startswith(name)]
    hint = f' Did you mean {longer[0]}?' if len(longer) == 1 else ''
    known = ', '.join(f'{target.chipset} ({target.product})' for target in TARGETS.values())
    raise InputError(
        f'chipset {chipset!r} is unknown.{hint} Use one of {known}; for another chip with HTP v{_OLDEST_ARCH} or newer '
        'give NUMBER:ARCH, its SoC model and HTP version in the table "Supported Snapdragon devices" of the QNN SDK.'
    )


def find_targets(chipsets: str) -> list[Target]:
    """Return the targets of a comma-separated list of chipsets, each once.

    Raises:
      InputError: a name is unknown, or there is none.
    """
    names = comma_list(chipsets)
    if not names:
        raise InputError(f'no chipset is named; use one or more of {", ".join(TARGETS)}.')
    return list(dict.fromkeys(find_target(name) for name in names))


def check_binary(path: pathlib.Path, target: Target) -> None:
    """Check that a context binary is for a target.

    Raises:
      InputError: the compiler made it for another chip, or for another version of the HTP.
    """
    with path.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = _BINARY.search(content)
        if found is None:
            return  # a binary of several graphs has no such entry
        chip, arch = found[1].decode().lower(), int(found[2])
    if arch != target.htp_arch or (target.chipset in TARGETS and chip != target.chipset):
        raise InputError(
            f'QNN compiled for {chip} (HTP v{arch}), not for {target.chipset} (v{target.htp_arch}). '
            'Check the two numbers of the chipset, and that onnxruntime-qnn is the pinned version.'
        )


def _by_number(soc_model: int, htp_arch: int) -> Target:
    """Return the target with QNN's numbers: a known one if there is one, else a new one."""
    for target in TARGETS.values():
        if target.soc_model == soc_model:
            if target.htp_arch != htp_arch:
                raise InputError(
                    f'chipset {soc_model}:{htp_arch}: {target.chipset} has HTP v{target.htp_arch}; give '
                    f'{soc_model}:{target.htp_arch}, or {target.chipset}.'
                )
            return target
    if htp_arch < _OLDEST_ARCH:
        raise InputError(f'chipset {soc_model}:{htp_arch}: the graphs need HTP v{_OLDEST_ARCH} or newer.')
    return Target(f'soc{soc_model}-v{htp_arch}', soc_model, htp_arch, f'SoC model {soc_model}')


def _names() -> dict[str, Target]:
    """Return the targets by every name, in lower case without spaces, hyphens and underscores."""
    names = {}
    for target in TARGETS.values():
        product = target.product.lower()
        spellings = (target.chipset, *target.aliases, product, product.removeprefix('snapdragon '))
        names |= {_plain(spelling): target for spelling in spellings}
    return names


def _plain(name: str) -> str:
    return re.sub(r'[\s_-]', '', name.lower())
