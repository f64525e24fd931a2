"""Tests of the pairs of pictures and prompts: by number or by table, never by order."""

from __future__ import annotations

import pytest

from neodragon_jax.base.errors import InputError
from train.data.first_frames import describe_pairs, pair_pictures

PROMPTS = [f'prompt {number}' for number in range(1, 12)]


def pictures(folder, names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b'')
    return folder


@pytest.mark.parametrize('first', [0, 1])
@pytest.mark.parametrize('name', ['{}.png', 'frame_{:03}.jpg', '2024-{}.webp'])
def test_numbers_decide_and_not_the_order_of_names(tmp_path, first, name):
    folder = pictures(tmp_path / 'f', [name.format(number + first) for number in range(11)] + ['notes.txt', '.1.png'])
    paired = pair_pictures(folder, PROMPTS, '--first-frame')
    assert [path.name for path in paired] == [name.format(number + first) for number in range(11)]


@pytest.mark.parametrize(
    ('names', 'message'),
    [
        (['1.png', '2.png'], '2 pictures for 3 prompts'),
        (['1.png', '2.png', '4.png'], 'number them from 1 to 3'),
        (['2.png', '3.png', '4.png'], 'number them from 1 to 3'),
        (['1.png', '01.png', '2.png'], '01.png and 1.png have the same number'),
        (['a.png', '1.png', '2.png'], 'a.png: no number in its name'),
        ([], '0 pictures for 3 prompts'),
    ],
)
def test_pictures_that_cannot_be_paired_are_refused(tmp_path, names, message):
    with pytest.raises(InputError, match=message):
        pair_pictures(pictures(tmp_path / 'f', names), PROMPTS[:3], '--first-frame')
    with pytest.raises(InputError, match='no such folder'):
        pair_pictures(tmp_path / 'nowhere', PROMPTS[:3], '--first-frame')


def test_a_table_pairs_by_prompt(tmp_path):
    pictures(tmp_path, ['x.png', 'y.png'])
    table = tmp_path / 'table.csv'
    table.write_text('file,caption\ny.png,"a dog, running"\nx.png,a cat\n')
    paired = pair_pictures(table, ['a cat', 'a dog, running'], '--first-frame')
    assert paired == [tmp_path / 'x.png', tmp_path / 'y.png']
    for rows, message in {
        'x.png,a cat\n': 'no picture for the prompt "a dog, running"',
        'x.png,a cat\ny.png,a cat\n': 'have one caption',
        'x.png,a cat\nz.png,"a dog, running"\n': 'z.png does not exist',
        'x.png,a cat\ny.png,a dog, running\n': 'put quotation marks',
    }.items():
        table.write_text('file,caption\n' + rows)
        with pytest.raises(InputError, match=message):
            pair_pictures(table, ['a cat', 'a dog, running'], '--first-frame')
    for content, message in {'': 'its first line names the columns', 'file,caption\n"x.png,a': 'not closed'}.items():
        table.write_text(content)
        with pytest.raises(InputError, match=f'--first-frame .*table.csv: .*{message}'):
            pair_pictures(table, ['a cat'], '--first-frame')
    with pytest.raises(InputError, match=r'--first-frame .*nowhere.csv: no such file'):
        pair_pictures(tmp_path / 'nowhere.csv', ['a cat'], '--first-frame')


def test_the_pairs_are_shown(tmp_path):
    paired = pair_pictures(pictures(tmp_path / 'f', [f'{number}.png' for number in range(1, 12)]), PROMPTS, '--x')
    lines = describe_pairs(paired, PROMPTS).splitlines()
    assert lines[1] == '  1.png  prompt 1' and lines[-1] == '  11.png  prompt 11' and lines[-2] == '  ... 7 more'
    assert describe_pairs(paired[:1], PROMPTS[:1]).splitlines()[1:] == ['  1.png  prompt 1']
