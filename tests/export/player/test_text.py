"""Prompts become the same tokens in the player as in the library."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest
from neodragon_phone.errors import BundleError
from neodragon_phone.generation import Request
from neodragon_phone.text import encode, encode_prompts, is_cut, tower_ids

from export.bundle.contents import Draft
from export.bundle.host_tables import write_tokenizer
from neodragon_jax.base.text import BadText, clean
from neodragon_jax.checkpoint import shipped
from neodragon_jax.generation.tokens import CLIP_LENGTH, Tokenizers, Tokens, cut_prompts
from support.goldens import TINY_CHECKPOINT

# Text that ftfy repairs, and that tokenizers normalize.
PROMPTS = [
    *('a small green square', '', 'word ' * 200, '  two  spaces ', 'tab\tand\nlines', "don't I'LL WE'VE"),
    *('A “big” red  circle, it’s here!', 'a „big“ circle', '‚single‘ «guillemets»', 'ʼtis a cat', 'cafe\u0301'),
    *('ﬁne ﬂower', 'ＡＢＣ circle', 'ideographic\u3000space', 'no\u00a0break', 'zero\u200bwidth\u200djoiner'),
    *('a &amp; b &lt;i&gt;', 'cafÃ© schÃ¶n', 'a circleâ€™s edge', '\ufeffa red cat', 'a\r\nb\rc', 'a\x85b\u2028c'),
    *('\x00a\x07b', '\x1b[31mred', '½ Ⅷ', 'İstanbul ß ǅ', '😀 👨‍👩‍👧 日本語', '</s> <pad> <|endoftext|> <extra_id_0>'),
]


@dataclasses.dataclass(frozen=True)
class Folder:
    """The part of a bundle that the tokenizers read."""

    folder: pathlib.Path

    def path(self, name):
        return self.folder / name


# As people type and paste them: PROMPTS, and texts that are cleaned or refused.
TYPED = [
    *PROMPTS,
    *('a trailing blank ', ' \t a leading one', 'a red cat\ufeff', 'e\u0301toile', 'e\ufeff\u0301t', 'a\u2028b\x0cc'),
    *('', ' ', '\ufeff', '\n\t', '\u200d\u200e', '\x07', 'lost \ufffd', 'a\0b', 'a caf\udce9', '\ud83d', 'x' * 10_001),
]
MODIFIERS = ('', ', FPS-24, high quality')
ROOTS = {'shipped': shipped.find('moving_shapes'), 'released': TINY_CHECKPOINT}
roots = pytest.mark.parametrize('root', ROOTS.values(), ids=ROOTS)


@dataclasses.dataclass(frozen=True)
class InBundle:
    """Tokenizers of a checkpoint as a bundle has them."""

    folder: Folder
    entries: dict[str, dict[str, object]]

    @classmethod
    def write(cls, tokenizers: Tokenizers, folder: pathlib.Path) -> InBundle:
        lengths, draft = {'clip_l': CLIP_LENGTH, 'clip_g': CLIP_LENGTH, 't5': tokenizers.t5.length}, Draft(folder)
        entries = {
            name: {'tokenizer': write_tokenizer(draft, name, getattr(tokenizers, name).backend, length)}
            for name, length in lengths.items()
        }
        return cls(Folder(folder), {name: entry | {'tokens': lengths[name]} for name, entry in entries.items()})

    def check(self, expected: Tokens, index: int, text: str) -> None:
        """Compare the player's tokens of a text with the library's of one of several."""
        for name, ids in (('clip_l', expected.clip_l_ids), ('clip_g', expected.clip_g_ids)):
            np.testing.assert_array_equal(tower_ids(self.folder, self.entries[name], text), ids[index], text)
        ids, mask = encode(self.folder, self.entries['t5'], text)
        np.testing.assert_array_equal(ids, expected.t5_ids[index], text)
        np.testing.assert_array_equal(mask, expected.t5_mask[index], text)


@roots
def test_tokens_are_the_checkpoints(root, tmp_path):
    """CLIP's text is repaired and T5's is not. The second checkpoint has parts of the released vocabularies."""
    tokenizers = Tokenizers.load(root)
    bundle, expected = InBundle.write(tokenizers, tmp_path), tokenizers(PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        bundle.check(expected, index, prompt)


@roots
def test_what_is_typed_becomes_the_tokens_of_the_librarys_command(root, tmp_path):
    tokenizers = Tokenizers.load(root)
    bundle, taken = InBundle.write(tokenizers, tmp_path), [text for text in TYPED if not _reason(text)]
    for modifier in MODIFIERS:
        expected = tokenizers([clean(text) for text in taken], modifier)
        for index, text in enumerate(taken):
            request = Request(text)
            bundle.check(expected, index, request.prompt + modifier)
            assert dataclasses.replace(request, seed=1).prompt == request.prompt, 'cleaning twice is cleaning once'


def test_what_the_librarys_command_refuses_is_refused_for_the_same_reason():
    refused = {text: reason for text in TYPED if (reason := _reason(text))}
    assert len(refused) > 8
    for text, reason in refused.items():
        with pytest.raises(BundleError) as error:
            Request(text)
        message = str(error.value)
        assert message == f'--prompt {text[:200]!r}: {reason}; correct it.' and message.isprintable()


def _reason(text: str) -> str:
    """Return why the library's command refuses a prompt, or '' if it does not."""
    try:
        clean(text, 'text')
    except BadText as reason:
        return str(reason)
    return ''


@roots
def test_prompts_that_are_cut_are_known(root, tmp_path):
    tokenizers = Tokenizers.load(root)
    bundle = InBundle.write(tokenizers, tmp_path)
    texts = [' '.join(['word'] * count) for count in (1, *range(50, 140))]
    cut = [text for text in texts if is_cut(bundle.folder, bundle.entries['t5'], text)]
    assert cut == cut_prompts(tokenizers.t5, texts) and 0 < len(cut) < len(texts)


def test_a_prompt_that_is_cut_is_reported(player):
    lines = []
    reporting = dataclasses.replace(player, report=lines.append)
    for prompt in ('a red circle', 'word ' * 200):
        encode_prompts(reporting, [prompt])
    limit = f'more than {player.manifest["text"]["dt5"]["tokens"]} tokens'
    assert [line for line in lines if 'cut' in line] == [f'The prompt has {limit} and is cut. Shorten it.']
