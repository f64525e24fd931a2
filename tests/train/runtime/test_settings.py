"""Settings become frozen dataclasses only if names, types, lengths and ranges are right."""

from __future__ import annotations

import dataclasses
import math

import pytest

from neodragon_jax.base.errors import InputError
from train.data import SampleSource
from train.runtime.optimizer import OptimizerConfig
from train.runtime.program import LoopConfig
from train.runtime.settings import defaults, freeze, missing, require, top_level


@dataclasses.dataclass(frozen=True)
class Section:
    rate: float = 1.0
    flag: bool = False
    sizes: tuple[int, ...] = (1, 2)
    seed: int = top_level(0)
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class Whole:
    seed: int
    name: str
    section: Section


def test_sections_inherit_from_the_top():
    whole = freeze(Whole, {'seed': 7, 'name': 'x', 'section': defaults(Section, rate=2.0)})
    assert whole == Whole(7, 'x', Section(2.0, seed=7))
    assert 'seed' not in defaults(Section)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'rate': 'fast'}, "config.section.rate is 'fast'; give a number"),
        ({'rate': True}, 'config.section.rate is True; give a number'),
        ({'rate': math.nan}, 'config.section.rate is nan; give a finite number'),
        ({'rate': math.inf}, 'config.section.rate is inf; give a finite number'),
        ({'flag': 1}, 'config.section.flag is 1; give True or False'),
        ({'sizes': 3}, 'config.section.sizes is 3; give a tuple'),
        ({'sizes': (1, 2.5)}, r'config.section.sizes\[1\] is 2.5; give a whole number'),
        ({'limit': 'x'}, "config.section.limit is 'x'; give a whole number"),
        ({'rates': 1.0}, 'config.section.rates: no such setting. Did you mean "rate"'),
    ],
)
def test_wrong_types_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        freeze(Whole, {'seed': 0, 'name': 'x', 'section': values})


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'learning_rate': -1e-4}, 'learning_rate is -0.0001; it must be at least 0'),
        ({'learning_rate': math.nan}, 'learning_rate is nan'),
        ({'clip_norm': 0.0}, 'clip_norm is 0.0; it must be greater than 0'),
        ({'epsilon': 0.0}, 'epsilon is 0.0'),
        ({'betas': (0.9,)}, r'betas is \(0.9,\); give 2 values'),
        ({'betas': (0.9, 1.0)}, r'betas is \(0.9, 1.0\); it must be at least 0 and less than 1'),
        ({'weight_decay': -1.0}, 'weight_decay is -1.0'),
    ],
)
def test_optimizers_that_cannot_train_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        freeze(OptimizerConfig, values)


def test_a_dataclass_refuses_a_nan_by_itself():
    with pytest.raises(InputError, match='learning_rate is nan; it must be at least 0'):
        OptimizerConfig(learning_rate=math.nan)
    with pytest.raises(InputError, match='seed is 4294967296; it must be at least 0 and less than 4294967296'):
        LoopConfig(steps=1, batch_size=1, seed=2**32)


def test_messages_of_a_section_name_its_place():
    with pytest.raises(InputError, match=r'^config\.loop\.steps is 0; it must be at least 1'):
        freeze(LoopConfig, {'steps': 0, 'batch_size': 1}, 'config.loop')
    with pytest.raises(InputError, match=r'^config\.loop\.best_mode is'):
        freeze(LoopConfig, {'steps': 1, 'batch_size': 1, 'best_mode': 'x'}, 'config.loop')
    # The value of a section that is set at the top.
    with pytest.raises(InputError, match=r'^config\.seed is -1'):
        freeze(LoopConfig, {'steps': 1, 'batch_size': 1}, 'config.loop', {'seed': -1})


def test_required_settings_may_be_in_a_section():
    settings = {'data': 'x', 'workdir': '', 'decoder': {'start': ''}}
    required = {'data': 'FOLDER', 'decoder.start': 'FOLDER of a VAE', 'workdir': 'FOLDER'}
    assert missing(settings, required) == ['decoder.start', 'workdir']
    with pytest.raises(InputError, match=r'config\.decoder\.start is empty; pass --config\.decoder\.start=FOLDER of a'):
        require(settings, required)
    require({'data': 'x'}, {'data': 'FOLDER'})


def test_work_folders_are_paths_as_typed(monkeypatch):
    """A bucket never becomes a local folder named `gs:`; `~` is the home folder."""
    monkeypatch.setenv('HOME', '/home/someone')
    assert LoopConfig(steps=1, batch_size=1, workdir='~/run').workdir == '/home/someone/run'
    assert LoopConfig(steps=1, batch_size=1, workdir='GS://bucket/run/').workdir == 'gs://bucket/run'
    with pytest.raises(InputError, match=r'config\.workdir gs:/bucket/run: one slash is missing'):
        LoopConfig(steps=1, batch_size=1, workdir='gs:/bucket/run')
    with pytest.raises(InputError, match='sample set s3://bucket/samples'):
        SampleSource('s3://bucket/samples')


@dataclasses.dataclass(frozen=True)
class Pair:
    low: float = 0.0
    message: str = ''

    def __post_init__(self) -> None:
        raise InputError(self.message)


@pytest.mark.parametrize(
    ('message', 'placed'),
    [
        ('low is 1', 'config.x.low is 1'),
        ('low, high are 1', 'config.x.low, high are 1'),
        ('low[1] is 2', 'config.x.low[1] is 2'),
        ('low.inner needs more', 'config.x.low.inner needs more'),
        ('Pair.low is 1', 'config.x.low is 1'),
        ('Pair: all is wrong', 'config.x: all is wrong'),
        ('the pair is wrong', 'config.x: the pair is wrong'),
        ('config.workdir is wrong', 'config.workdir is wrong'),
    ],
)
def test_no_message_of_a_section_lacks_its_place(message, placed):
    with pytest.raises(InputError) as error:
        freeze(Pair, {'message': message}, 'config.x')
    assert str(error.value) == placed
