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
        ('  a\r\n b\x0cc\t', 'a b c'),
        ('b\0c', BadText(r'caption has NUL characters \(UTF-16')),
        ('e\u0301', 'é'),
        ('\ufeffx', 'x'),
        ('e\ufeff\u0301', '\u00e9'),
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
        ('v1.mp4,"a red\nsub/v2,b blue\nv3,c"\n', 2),  # names without suffix
        ('v0,x\nv1,"a red\nv2"\nv3,"c,d\ne,f"\n', 5),
        ('v1, "a red\nv2, b blue\nv3, c"\n', 2),  # blanks after the separators
    ],
)
def test_an_open_quotation_mark_is_an_error_with_its_line(tmp_path, rows, line):
    (tmp_path / 'c.csv').write_text(f'file,caption\n{rows}')
    with pytest.raises(InputError, match=rf'c\.csv: the row of line {line} has a quotation mark that is not closed'):
        read_table(tmp_path / 'c.csv', tmp_path)


@pytest.mark.parametrize(
    ('header', 'rows'),
    [
        ('caption,file', '"a red one,clap\nclap caption,crop\nx",prim_p3.mp4\n'),
        ('caption,file', '"a red one,clap\nx",prim_p3.mp4\n'),
        ('n,caption,file', '1,"a red,v1\n2,b,v2\n3,c",v3\n'),
        ('n,caption,file', '1,"a red\n2,c",v2\n'),
        ('file, caption', 'v1,"a red\nv2, b"\n'),
        ('file\tcaption', 'v1\t"a red\nv2\t b"\n'),
    ],
)
def test_an_open_quotation_mark_is_found_in_any_column(tmp_path, header, rows):
    path = tmp_path / ('c.tsv' if '\t' in header else 'c.csv')
    path.write_text(f'{header}\n{rows}')
    with pytest.raises(InputError, match=r'the row of line 2 has a quotation mark .* write its field on one line'):
        read_table(path, tmp_path)


PROSE = 'A dog runs, then jumps,\nwith a red ball, for 1,000 times.\n\nA cat, black, sleeps\n(quietly)'


@pytest.mark.parametrize('header', ['file,caption', 'caption,file', 'n,caption,file', 'file,n,caption'])
def test_captions_of_several_lines_are_prose(tmp_path, header):
    cells = {'file': 'v1', 'caption': f'"{PROSE}"', 'n': '1'}
    (tmp_path / 'c.csv').write_text(f'{header}\n{",".join(cells[name] for name in header.split(","))}\n')
    assert read_table(tmp_path / 'c.csv', tmp_path).by_file == {'v1': ' '.join(PROSE.split())}


def test_a_column_named_twice_is_refused(tmp_path):
    for header in ('file,caption,caption', 'file,File ,caption', 'path,text,TEXT'):
        (tmp_path / 'c.csv').write_text(f'{header}\nv1.mp4,a,b\n')
        with pytest.raises(InputError, match=r'its first line names the column (caption|file|text) twice'):
            read_table(tmp_path / 'c.csv', tmp_path)
    (tmp_path / 'c.jsonl').write_text('{"file": "v1", "File": "v2", "caption": "a"}\n{"file": "v3", "caption": "c"}')
    captions = read_table(tmp_path / 'c.jsonl', tmp_path)
    assert captions.by_file == {'v3': 'c'}
    assert captions.problems == {'c.jsonl:1': 'line 1: has the key file twice, in different spellings'}


@pytest.mark.parametrize('table', ['file,caption,,\nv1.mp4,a,,\n', ',file,caption\n0,v1.mp4,a\n'])
def test_columns_without_a_name_are_ignored(tmp_path, table):
    """As software leaves them: commas at the end, or the index of a data frame at the beginning."""
    (tmp_path / 'c.csv').write_text(table)
    captions = read_table(tmp_path / 'c.csv', tmp_path)
    assert (captions.by_file, captions.problems) == ({'v1.mp4': 'a'}, {})


def test_blanks_around_a_name_are_not_part_of_it(tmp_path):
    (tmp_path / 'c.csv').write_text('file , caption\n v1.mp4 , a\n"v2.mp4 ",b\n')
    assert read_table(tmp_path / 'c.csv', tmp_path).by_file == {'v1.mp4': 'a', 'v2.mp4': 'b'}
    (tmp_path / 'c.ndjson').write_text('{"file": " v1.mp4 ", "caption": "a"}')
    assert read_table(tmp_path / 'c.ndjson', tmp_path).by_file == {'v1.mp4': 'a'}


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
        ('file,caption\na.mp4,a dog\n'.encode('utf-16-le'), 'NUL characters in its first line .UTF-16'),
        ('file,caption\na.mp4,a dog\n'.encode('utf-16-be'), 'NUL characters in its first line .UTF-16'),
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
