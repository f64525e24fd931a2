"""Prompt sets hold the tokens of the checkpoint's tokenizers, each prompt once, for any form of the file."""

from __future__ import annotations

import numpy as np
import pytest

from neodragon_jax.generation.tokens import Tokenizers
from support.goldens import TINY_CHECKPOINT
from train import prompts
from train.data import SampleSource

LINES = 'a cat\r\n\n  a  cat \ncafé\ncafe\u0301\na\u2028dragon 🐉\x0bflies\n\u200d\n'


def arguments(tmp_path, *more: str) -> list[str]:
    given = ['--checkpoint', str(TINY_CHECKPOINT), '--file', str(tmp_path / 'p.txt'), '--out', str(tmp_path / 'set')]
    return [*given, '--samples-per-shard', '2', *more]


def test_prompts_become_tokens(tmp_path, capsys):
    (tmp_path / 'p.txt').write_bytes(LINES.encode() + b'caf\xe9\n')
    assert prompts.main(arguments(tmp_path, '--prompt-modifier', ', sharp')) == 0
    source = SampleSource(tmp_path / 'set', verify=True)
    want = ['a cat', 'café', 'a dragon 🐉 flies']
    assert [source[index]['prompt'] for index in range(len(source))] == want
    tokens = Tokenizers.load(TINY_CHECKPOINT)(want, ', sharp')
    for index in range(len(want)):
        sample = source[index]
        np.testing.assert_array_equal(sample['ids'], tokens.t5_ids[index])
        np.testing.assert_array_equal(sample['text_mask'], tokens.t5_mask[index])
        np.testing.assert_array_equal(sample['clip_l_ids'], tokens.clip_l_ids[index])
        np.testing.assert_array_equal(sample['clip_g_ids'], tokens.clip_g_ids[index])
        assert sample['ids'].dtype == np.int32
    printed = capsys.readouterr().out
    assert '3 prompts, 3 of them written now' in printed
    assert '2 lines left out: repeated' in printed
    assert '2 lines left out: line is empty' in printed
    assert '1 lines left out: line is not valid Unicode' in printed


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, capsys):
    (tmp_path / 'p.txt').write_text('\n'.join(f'prompt {index}' for index in range(7)))

    def interrupted(*given):
        for record in records(*given):
            if record['index'] == 5:
                raise KeyboardInterrupt
            yield record

    records = prompts.records
    monkeypatch.setattr(prompts, 'records', interrupted)
    assert prompts.main(arguments(tmp_path)) == 130
    monkeypatch.setattr(prompts, 'records', records)
    assert prompts.main(arguments(tmp_path)) == 0
    assert '7 prompts, 2 of them written now' in capsys.readouterr().out
    source = SampleSource(tmp_path / 'set', verify=True)
    assert [source[index]['prompt'] for index in range(7)] == [f'prompt {index}' for index in range(7)]
    (tmp_path / 'p.txt').write_text('another')
    assert prompts.main(arguments(tmp_path)) == 2
    assert 'was begun with count = 7, not 1' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('content', 'more', 'message'),
    [
        (b'\n \n', [], 'no prompt in it'),
        (b'x', ['--file', 'nowhere.txt'], '--file nowhere.txt: no such file'),
        (b'x', ['--checkpoint', 'nowhere'], 'no such checkpoint folder'),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, capsys, content, more, message):
    (tmp_path / 'p.txt').write_bytes(content)
    assert prompts.main(arguments(tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1
