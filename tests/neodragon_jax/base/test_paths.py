"""Tests of path parsing: no path is read as another kind; one table lists the meaning of each text."""

from __future__ import annotations

import pathlib

import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.paths import input_path, storage_path, user_path


@pytest.mark.parametrize(
    ('text', 'path'),
    [
        ('dir/x', 'dir/x'),
        ('./gs:/x', 'gs:/x'),
        ('/dir/x', '/dir/x'),
        ('my dir/ x', 'my dir/ x'),
        ('~/x', '/home/someone/x'),
        ('~', '/home/someone'),
        ('a~b', 'a~b'),
        ('file:///dir/x', '/dir/x'),
        ('FILE:///my%20dir/x', '/my dir/x'),
        ('file:/dir/x', '/dir/x'),
        ('word:rest', 'word:rest'),
        ('a cat: x', 'a cat: x'),
        ('word:/rest', 'word:/rest'),
        (pathlib.Path('dir/x'), 'dir/x'),
        ('dir/\udce9', 'dir/\udce9'),
    ],
)
def test_local_paths(text, path, monkeypatch):
    monkeypatch.setenv('HOME', '/home/someone')
    assert user_path(text, '--out') == pathlib.Path(path)
    assert storage_path(text, '--out') == pathlib.Path(path)


@pytest.mark.parametrize(
    ('text', 'path'),
    [
        ('gs://bucket/x', 'gs://bucket/x'),
        ('GS://bucket/Dir/x', 'gs://bucket/Dir/x'),
        ('gs://bucket', 'gs://bucket'),
        ('gs://bucket/', 'gs://bucket'),
        ('gs://bucket//my dir/x/', 'gs://bucket/my dir/x'),
        ('gs://my.bucket_1/a~b/%20', 'gs://my.bucket_1/a~b/%20'),
    ],
)
def test_buckets(text, path):
    assert str(storage_path(text, '--out')) == path
    assert str(storage_path(storage_path(text, '--out'), '--out')) == path


@pytest.mark.parametrize(
    ('text', 'remedy'),
    [
        ('gs:/bucket/x', 'write gs://bucket/x'),
        ('gs:///bucket/x', 'write gs://BUCKET/PATH'),
        ('gs://', 'write gs://BUCKET/PATH'),
        ('gs://Bucket/x', 'in lower case'),
        ('gs://bucket/../x', 'no . or ..'),
        ('gs://bucket/a\nb', 'control characters'),
        ('s3://bucket/x', 'aws s3 cp'),
        ('hf://org/name', 'only --checkpoint'),
        ('', 'is empty'),
    ],
)
def test_other_texts_of_buckets_are_refused_with_the_remedy(text, remedy):
    with pytest.raises(InputError) as error:
        storage_path(text, '--out')
    message = str(error.value)
    assert message.startswith('--out') and remedy in message and '\n' not in message


@pytest.mark.parametrize('read', [user_path, storage_path, input_path])
def test_links_in_a_circle_are_refused(tmp_path, read):
    (tmp_path / 'a').symlink_to('b')
    (tmp_path / 'b').symlink_to('a')
    for path in (tmp_path / 'a', tmp_path / 'a' / 'below'):
        with pytest.raises(InputError, match=r'--out .*: links form a circle; correct the path'):
            read(path, '--out')
    (tmp_path / 'c').symlink_to('nowhere')
    assert user_path(tmp_path / 'c', '--out') == tmp_path / 'c'


@pytest.mark.parametrize(
    ('text', 'remedy'),
    [
        ('', 'is empty'),
        ('a\nb', 'control characters'),
        ('gs:/bucket/x', 'write gs://bucket/x'),
        ('GS:/bucket/x', 'write gs://bucket/x'),
        (pathlib.Path('gs://bucket/x'), 'write gs://bucket/x'),
        ('gs://bucket/x', 'gs://bucket/x: mount the bucket'),
        ('GS://bucket/x', 'gcloud storage cp'),
        ('gs://', 'gcloud storage cp'),
        ('s3://bucket/x', 's3://bucket/x: give a local folder'),
        ('S3://bucket/x', 'aws s3 cp'),
        ('hf://org/name', 'only --checkpoint, --student and --start take names'),
        ('https://host/x.png', 'download it first'),
        ('file://host/x', 'names a host'),
        ('ftp://host/x', 'not supported'),
        ('~nobody-of-this-name/x', 'no such user'),
    ],
)
def test_other_texts_are_refused_with_the_remedy(text, remedy):
    with pytest.raises(InputError) as error:
        user_path(text, '--out')
    message = str(error.value)
    assert message.startswith('--out') and remedy in message and '\n' not in message
