"""Chipsets of the player: the names that the exporter knows, and the detection of a machine's own."""

import dataclasses
import sys
import types
from typing import Any

import pytest
from neodragon_phone import __main__ as command
from neodragon_phone.backends import _simulated_chipset
from neodragon_phone.bundle import Bundle
from neodragon_phone.chipsets import detect_chipset, find_chipset
from neodragon_phone.errors import BundleError

from export.qnn.chipsets import TARGETS, find_target

CHIPSETS = {name: dataclasses.asdict(target) for name, target in TARGETS.items()}
GRADES = ('', '-AB', '-AC', '-3-AB', '-1-AA', 'P')


def test_names_and_grades_are_the_exporters():
    for target in TARGETS.values():
        for model in (target.chipset, *target.aliases):
            for name in (model + grade for grade in GRADES if model[-1].isdigit()):
                assert find_chipset(CHIPSETS, name.upper()) == find_target(name).chipset == target.chipset
    assert find_chipset(CHIPSETS, 'x1e-80-100') == 'sc8380xp'
    for name in ('', 'sm0000', 'SM8750-AZ', 'AB', '-ab'):
        assert find_chipset(CHIPSETS, name) is None


def test_a_graded_name_opens_the_binaries_and_the_simulator(bundle_folder):
    bundle = Bundle.open(bundle_folder, 'SM8750-AB')
    assert bundle.place == 'sm8750' and any(name.startswith('binaries/') for name in bundle.verified)
    assert _simulated_chipset(bundle, 'SM8750-AC') == _simulated_chipset(bundle, None) == 'sm8750'
    with pytest.raises(BundleError, match='--chipset sm8550: the bundle is for sm8750'):
        _simulated_chipset(bundle, 'sm8550')


def _on_windows(monkeypatch, values: dict[str, Any]) -> None:
    """Replace the registry, whose key of the processor has given values."""

    class Key(dict):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    def open_key(root, path):
        assert (root, path) == ('HKLM', r'HARDWARE\DESCRIPTION\System\CentralProcessor\0')
        return Key(values)

    def query(key, name):
        if name not in key:
            raise FileNotFoundError(2, 'The system cannot find the file specified')
        return key[name], 1

    module = types.SimpleNamespace(HKEY_LOCAL_MACHINE='HKLM', OpenKey=open_key, QueryValueEx=query)
    monkeypatch.setitem(sys.modules, 'winreg', module)
    monkeypatch.setattr('platform.system', lambda: 'Windows')
    monkeypatch.setattr('platform.processor', lambda: 'ARMv8 (64-bit) Family 8 Model 1, Qualcomm Technologies Inc')


@pytest.mark.parametrize(
    ('text', 'chipset'),
    [
        ('Snapdragon(R) X Elite - X1E80100 - Qualcomm(R) Oryon(TM) CPU', 'sc8380xp'),
        ('Snapdragon(R) X Elite - X1E78100 - Qualcomm(R) Oryon(TM) CPU', 'sc8380xp'),
        ('Snapdragon(R) X2 Elite - X2E88100 - Qualcomm(R) Oryon(TM) CPU', 'sc8480xp'),
        ('Snapdragon(R) X Plus - X1P42100 - Qualcomm(R) Oryon(TM) CPU', None),
    ],
)
def test_a_laptop_is_known_by_its_processors_name(monkeypatch, text, chipset):
    _on_windows(monkeypatch, {'ProcessorNameString': text, 'Identifier': 'ARMv8 (64-bit) Family 8'})
    assert find_chipset(CHIPSETS, detect_chipset()) == chipset


@pytest.mark.parametrize('values', [{}, {'ProcessorNameString': 'Intel(R) Core(TM) i7-1370P'}])
def test_another_laptop_must_name_its_chipset(monkeypatch, values):
    _on_windows(monkeypatch, values)
    with pytest.raises(BundleError, match='cannot be detected; name it with --chipset'):
        detect_chipset()


def test_the_command_reports_a_laptop_that_the_bundle_is_not_for(bundle_folder, monkeypatch, capsys):
    _on_windows(monkeypatch, {'ProcessorNameString': 'Snapdragon(R) X Elite - X1E80100 - Qualcomm(R) Oryon(TM) CPU'})
    assert command.main([str(bundle_folder), '--backend', 'htp']) == 2
    assert "no binaries for 'X1E80100', only for sm8750" in capsys.readouterr().err
