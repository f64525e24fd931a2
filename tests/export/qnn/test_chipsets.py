"""Chipsets: names, numbers, and support of each by the compiler."""

from __future__ import annotations

import pathlib

import pytest

from export.qnn.chipsets import TARGETS, check_binary, find_target, find_targets
from export.qnn.compile import compile_graph
from neodragon_jax.base.errors import InputError
from support.linear_graph import write_linear


@pytest.mark.parametrize(
    ('name', 'chipset'),
    [
        ('SM8750', 'sm8750'),
        ('sm8750-ab', 'sm8750'),
        ('SM8750-3-AC', 'sm8750'),
        ('SM8550P', 'sm8550'),
        ('SM8845-AB', 'sm8845'),
        ('SM7675-2-AB', 'sm7675'),
        ('SM8635P', 'sm8635'),
        ('Snapdragon 8 Elite', 'sm8750'),
        ('8 elite gen 5', 'sm8850'),
        ('8 Gen 5', 'sm8845'),
        ('8s Gen 3', 'sm8635'),
        ('7+ Gen 3', 'sm7675'),
        ('X1E80100', 'sc8380xp'),
        ('x1e-80-100', 'sc8380xp'),
        ('X Elite', 'sc8380xp'),
        ('60:73', 'sc8380xp'),
        ('69:v79', 'sm8750'),
    ],
)
def test_names_of_a_chipset(name, chipset):
    assert find_target(name).chipset == chipset


def test_chipsets_in_a_list():
    assert [target.soc_model for target in find_targets('sm8750, SM8650,sm8750')] == [69, 57]
    with pytest.raises(InputError, match='no chipset'):
        find_targets(' , ')


def test_a_chipset_by_its_numbers():
    target = find_target('94:81')
    assert (target.chipset, target.soc_model, target.htp_arch) == ('soc94-v81', 94, 81)
    with pytest.raises(InputError, match='sm8750 has HTP v79; give 69:79'):
        find_target('69:81')
    with pytest.raises(InputError, match='HTP v73 or newer'):
        find_target('36:69')


@pytest.mark.parametrize('name', ['sm8651', 'sm8855', 'sm8850l', 'sm8', '8 gen 4', '', 'x3e80100'])
def test_no_other_chipset_is_suggested(name):
    """Each name is a different chip or none: a binary for a similar chip would not load."""
    with pytest.raises(InputError, match='NUMBER:ARCH') as error:
        find_target(name)
    assert 'Did you mean' not in str(error.value)


def test_an_incomplete_name_is_completed():
    with pytest.raises(InputError, match='Did you mean "sm8750"'):
        find_target('sm875')


@pytest.fixture(scope='module')
def linear(tmp_path_factory) -> pathlib.Path:
    return write_linear(tmp_path_factory.mktemp('linear'))


@pytest.mark.qnn
@pytest.mark.parametrize('chipset', [*TARGETS, '94:81'])
def test_compiler_knows_every_chipset(chipset, linear, tmp_path):
    """The binary contains the chip and the HTP version that it was compiled for."""
    target = find_target(chipset)
    metadata = compile_graph('linear', linear, tmp_path / 'out', target, 'w8a16', {})
    assert metadata['chipset']['htp_arch'] == target.htp_arch
    (binary,) = (tmp_path / 'out').glob('*.bin')
    content = binary.read_bytes()
    assert f'arch={target.htp_arch};'.encode() in content
    if chipset in TARGETS:
        assert f'soc_type={chipset.upper()};'.encode() in content
        assert f'vtcm_size={target.vtcm_mb << 20};'.encode() in content
    wrong = find_target('sm8650' if target.chipset != 'sm8650' else 'sm8750')
    with pytest.raises(InputError, match=r'QNN compiled for .* not for sm8[67]50'):
        check_binary(binary, wrong)
