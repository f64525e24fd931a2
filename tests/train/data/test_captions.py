"""Captions are cleaned, and every problem is reported, for any form of the table."""

from __future__ import annotations

import json

import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.text import BadText, clean
from train.data.captions import read_table


@pytest.mark.parametrize(
    ('text', 'want'),
    [
        ('  a\r\n b\0c\t', 'a b c'),
        ('e\u0301', 'é'),
        ('\ufeffx', 'x'),
        ('👩\u200d🚀 می\u200cخواهم', '👩\u200d🚀 می\u200cخواهم'),  # joiners are meaningful
        ('', BadText('caption is empty')),
        ('\u200e\u200d ', BadText('caption is empty')),
        ('\ud83d', BadText('caption is not valid Unicode')),
        (3, BadText('caption is not a text')),
        ('x' * 10_001, BadText('caption has 10001 characters')),
    ],
)
def test_captions_are_cleaned(text, want):
    if isinstance(want, str):
        assert clean(text) == want
    else:
        with pytest.raises(BadText, match=str(want)):
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
    assert captions.problems == {
        'c.jsonl:2': 'line 2: not valid JSON (Expecting value: line 1 column 1 (char 0)). Copy the file again.',
        'c.jsonl:3': 'line 3: the content is [1]; it must be an object. Correct it, or copy the file again.',
        'c.jsonl:5': 'line 5: text has a character that is not valid Unicode. Correct it.',
        'c.jsonl:7': 'line has no file or no caption',
    }
    (tmp_path / 'c.csv').write_text('name,words\na,b\n')
    with pytest.raises(InputError, match=r'its first line names the columns name, words; name one of them file'):
        read_table(tmp_path / 'c.csv', tmp_path)
    with pytest.raises(InputError, match=r'give a \.csv or \.jsonl file'):
        read_table(tmp_path / 'c.xlsx', tmp_path)
    with pytest.raises(InputError, match='no such file'):
        read_table(tmp_path / 'd.csv', tmp_path)


@pytest.mark.parametrize(
    'header',
    [
        'file,caption',
        'File,Caption',
        ' FILE_NAME , Text ',
        '\ufefffilename,prompt',
        'path,description',
        'video,CAPTION,x',
    ],
)
def test_the_usual_column_names_are_known_in_any_case(tmp_path, header):
    extra = ',1' if header.count(',') == 2 else ''
    (tmp_path / 'c.csv').write_text(f'{header}\r\na.mp4,"a dog, running"{extra}\r\n', encoding='utf-8')
    assert read_table(tmp_path / 'c.csv', tmp_path).by_file == {'a.mp4': 'a dog, running'}
    keys = header.replace('\ufeff', '').split(',')
    (tmp_path / 'c.jsonl').write_text(json.dumps({keys[0].strip(): 'a.mp4', keys[1].strip(): 'a dog'}))
    assert read_table(tmp_path / 'c.jsonl', tmp_path).by_file == {'a.mp4': 'a dog'}


def test_a_row_with_other_fields_than_the_header_is_left_out_by_line(tmp_path):
    (tmp_path / 'c.csv').write_text('file,caption\na.mp4,a dog runs, then jumps\n\nb.mp4,a cat\nc.mp4\n')
    captions = read_table(tmp_path / 'c.csv', tmp_path)
    assert captions.by_file == {'b.mp4': 'a cat'}
    assert captions.problems == {
        'a.mp4': 'c.csv, line 2: 3 fields, its header has 2; put quotation marks around the caption',
        'c.mp4': 'c.csv, line 5: 1 fields, its header has 2; put quotation marks around the caption',
    }


@pytest.mark.parametrize(
    ('rows', 'line'),
    [
        ('a.mp4,a dog\nb.mp4,"a cat sleeps\nc.mp4,a bird\n', 3),  # open to the end
        ('a.mp4,a dog\nb.mp4,"a cat sleeps\nc.mp4,a bird\nd.mp4,"a fish, in water"\n', 3),  # closed by a later row
        ('a.mp4,"a dog"\nb.mp4,"a cat sleeps\nc.mp4,a bird\nd.mp4,a ""\nx"\n', 3),
        ('a.mp4,"a sign that says \\"open\\" blinks"\n', 2),  # not doubled
        ('a.mp4,"a dog" runs\n', 2),
        ('a.mp4,"two\nlines"\nb.mp4,"open\n', 4),
    ],
)
def test_an_open_quotation_mark_is_an_error_with_its_line(tmp_path, rows, line):
    (tmp_path / 'c.csv').write_text(f'file,caption\n{rows}')
    with pytest.raises(InputError, match=rf'c\.csv: the row of line {line} has a quotation mark that is not closed'):
        read_table(tmp_path / 'c.csv', tmp_path)


def test_quoted_captions_may_have_quotes_and_lines(tmp_path):
    (tmp_path / 'c.csv').write_text('file,caption\r\na.mp4,"a ""big"" dog\r\nruns, fast"\r\nb.mp4, "x"\r\n')
    assert read_table(tmp_path / 'c.csv', tmp_path).by_file == {'a.mp4': 'a "big" dog runs, fast', 'b.mp4': 'x'}
    (tmp_path / 'c.tsv').write_text('file\tcaption\na.mp4\ta dog, running\n')
    assert read_table(tmp_path / 'c.tsv', tmp_path).by_file == {'a.mp4': 'a dog, running'}


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'file;caption\na.mp4;a dog\n', 'the columns file;caption; name one of them file .* separated by commas'),
        (b'file\tcaption\na.mp4\ta dog\n', 'separated by commas'),
        ('file,caption\na.mp4,a dog\n'.encode('utf-16'), 'UTF-16 text. Save it as UTF-8'),
        (b'', 'its first line names the columns'),
    ],
)
def test_other_tables_are_refused(tmp_path, content, message):
    (tmp_path / 'c.csv').write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_table(tmp_path / 'c.csv', tmp_path)


def test_absolute_names_are_found_through_links(tmp_path):
    folder, link = tmp_path / 'disk' / 'videos', tmp_path / 'link'
    folder.mkdir(parents=True)
    link.symlink_to(folder)
    names = [f'{link}/a.mp4', f'{folder}/b.mp4', './sub/../c.mp4', f'{tmp_path}/other/d.mp4']
    (tmp_path / 'c.csv').write_text('file,caption\n' + ''.join(f'{name},x\n' for name in names))
    want = {'a.mp4', 'b.mp4', 'c.mp4', f'{tmp_path}/other/d.mp4'}
    for root in (folder, link):
        assert read_table(tmp_path / 'c.csv', root).by_file.keys() == want
