"""Tests of the prompt reader: formats, line ends, encodings, and errors with line numbers."""

from __future__ import annotations

import collections

import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.evaluation.prompt_files import read_prompts
from neodragon_jax.generation.jobs import video_name

CAT_DOG = ['a cat', 'a dog']


@pytest.mark.parametrize(
    ('name', 'content'),
    [
        ('p.txt', b'a cat\na dog\n'),
        ('p.txt', b'\xef\xbb\xbfa cat\r\n\r\n  a  dog \r\na cat'),
        ('p.txt', b'a cat\ra dog\r'),
        ('p.md', b'\n\na\x0ccat\n\x0c\na\xe2\x80\xa8dog'),
        ('p.json', b'["a cat", "a dog", "a cat"]'),
        ('VBench_full_info.json', b'\xef\xbb\xbf[{"prompt_en": "a cat", "dimension": []}, {"prompt_en": "a dog"}]'),
        ('p.jsonl', b'"a cat"\r\n\n{"Prompt": "a dog", "id": 1}\n'),
        ('p.ndjson', b'"a cat"\n{"prompt": "a dog"}\n'),
        ('p.csv', b'n, prompt\n1, "a cat"\n2, a dog\n'),
        ('p.csv', b'\xef\xbb\xbffile,Caption\r\n1.mp4,a cat\r\n\r\n2.mp4,"a dog"\r\n'),
        ('p.CSV', b'text,n\n"a\ncat",1\na dog,2\n'),
        ('p.tsv', b'id\tprompt\n1\ta cat\n2\ta dog\n'),
    ],
)
def test_formats(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name) == CAT_DOG


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('p.txt', b'', 'empty'),
        ('p.txt', b'\xef\xbb\xbf\n \n\x0c\n', 'empty'),
        ('p.txt', b'a cat\ncaf\xe9\n', 'line 2: line is not valid Unicode'),
        ('p.txt', 'a cat\nlost \ufffd\n'.encode(), 'line 2: line has lost characters'),
        ('p.txt', b'a cat\n' + b'x' * 20_000, 'line 2: line has 20000 characters'),
        ('p.txt', 'a cat'.encode('utf-16'), 'UTF-16'),
        ('p.json', b'{"prompt": "a cat"}', 'not a list'),
        ('p.json', b'["a cat",\n"a dog"', "p.json: not valid JSON (Expecting ',' delimiter: line 2"),
        ('p.json', b'["a cat", 3]', 'entry 2: not a text'),
        ('p.json', b'["a cat", {"title": "a dog"}]', 'entry 2: 0 columns with prompts among title'),
        ('p.json', b'[' * 100_000, 'more than 32 levels'),
        ('p.json', b'["a cat", "\\ud83d"]', '[1] has a character that is not valid Unicode'),
        ('p.jsonl', b'"a cat"\n{"prompt": \n', 'line 2: not valid JSON'),
        ('p.jsonl', b'"a cat"\n{"prompt": "x", "caption": "y"}\n', 'line 2: 2 columns'),
        ('p.csv', b'a cat\na dog\n', 'line 1: 0 columns'),
        ('p.csv', b'prompt,n\na cat, and a dog,1\n', 'line 2: 3 fields, the header has 2'),
        ('p.csv', b'prompt,n\na cat,1\n"an open quote,2\na dog,3\n', 'the row of line 3 has a quotation mark'),
        ('p.csv', b'n,prompt\n1,"a cat\n2,a dog\n3,a bird"\n', 'the row of line 2 has a quotation mark'),
        ('p.txt', 'a cat\na dog'.encode('utf-16-le'), 'UTF-16'),
        ('p.txt', '猫\n犬'.encode('utf-16-be'), 'UTF-16'),
        ('p.txt', b'a cat\na\0dog\n', 'line 2: line has NUL characters'),
        ('p.yaml', b'- a cat\n', '.yaml is not read. Save it as text'),
        ('p.XML', b'<p>a cat</p>\n', '.XML is not read'),
        ('p.toml', b'p = "a cat"\n', '.toml is not read'),
        ('p.xlsx', b'PK', '.xlsx is not read'),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read_prompts(tmp_path / name)
    assert message in str(error.value) and name in str(error.value) and '\n' not in str(error.value)


def test_a_counter_leaves_out_bad_lines(tmp_path):
    (tmp_path / 'p.txt').write_bytes(b'a cat\n\ncaf\xe9\na cat\na dog\n')
    left_out = collections.Counter[str]()
    assert read_prompts(tmp_path / 'p.txt', '--file', left_out) == CAT_DOG
    assert left_out == {'line is empty': 1, 'line is not valid Unicode (not UTF-8?)': 1, 'repeated': 1}


def test_missing_file_is_named_with_its_option(tmp_path):
    with pytest.raises(InputError, match=r'--file .*nowhere\.txt: no such file'):
        read_prompts(tmp_path / 'nowhere.txt', '--file')


def test_no_two_prompts_share_a_file():
    """Lossy names as keys: a changed name gets a digest; plain prompts keep VBench's names."""
    assert video_name('a cat', 3) == 'a cat-3'
    odd = ['a/b', 'a_b', 'a\\b', 'a\nb', '', '.', '..', '...x', '_..x', '_', 'é' * 400, 'é' * 399, 'a\0b', 'a\u2028b']
    names = [video_name(prompt, 0) for prompt in odd]
    assert len(set(names)) == len(odd)
    for prompt, name in zip(odd, names, strict=True):
        assert not name.startswith(('.', '-')) and '/' not in name and len(name.encode()) < 240
        assert (name == f'{prompt}-0') == (prompt in ('a_b', '_..x', '_'))
