"""Captions are cleaned, and what is wrong with one is said, whatever the table looks like."""

from __future__ import annotations

import json

import pytest

from neodragon_jax.base.errors import InputError
from train.data.captions import BadCaption, clean, read_table


@pytest.mark.parametrize(
    ('text', 'want'),
    [
        ('  a\r\n b\0c\t', 'a b c'),
        ('e\u0301', 'é'),
        ('\ufeffx', 'x'),
        ('👩\u200d🚀 می\u200cخواهم', '👩\u200d🚀 می\u200cخواهم'),  # joiners mean something
        ('', BadCaption('caption is empty')),
        ('\u200e\u200d ', BadCaption('caption is empty')),
        ('\ud83d', BadCaption('caption is not valid Unicode')),
        (3, BadCaption('caption is not a text')),
        ('x' * 10_001, BadCaption('caption has 10001 characters')),
    ],
)
def test_captions_are_cleaned(text, want):
    if isinstance(want, str):
        assert clean(text) == want
    else:
        with pytest.raises(BadCaption, match=str(want)):
            clean(text)


def test_tables(tmp_path):
    rows = ['{"path": "./a.mp4", "text": "\\ud83d\\udc09"}', 'oops', '[1]', '', '{"path": "b", "text": "\\ud83d"}']
    rows += [
        '{"path": "a.mp4", "text": "another"}',
        '{"path": "c.mp4"}',
        json.dumps({'path': f'{tmp_path}/d.mp4', 'text': 'd'}),
    ]
    (tmp_path / 'c.jsonl').write_text('\n'.join(rows))
    captions = read_table(tmp_path / 'c.jsonl', tmp_path)
    assert captions.by_file == {'a.mp4': '🐉', 'd.mp4': 'd'}
    assert captions.repeated == ['a.mp4']
    line = 'line has no file or no caption'
    assert captions.problems == {
        'c.jsonl:2': line, 'c.jsonl:3': line, 'c.jsonl:7': line, 'b': 'caption is not valid Unicode (not UTF-8?)'
    }  # fmt: skip
    assert captions.problem_of('b.mp4').startswith('caption is not valid')
    (tmp_path / 'c.csv').write_text('name,words\na,b\n')
    with pytest.raises(InputError, match=r'its first line names the columns name, words; name one of them file'):
        read_table(tmp_path / 'c.csv', tmp_path)
    with pytest.raises(InputError, match=r'give a \.csv or \.jsonl file'):
        read_table(tmp_path / 'c.xlsx', tmp_path)
    with pytest.raises(InputError, match='no such file'):
        read_table(tmp_path / 'd.csv', tmp_path)
