"""Prompts become the same tokens in the player as in the library."""

import dataclasses
import pathlib

import numpy as np
import pytest
from neodragon_phone.errors import BundleError
from neodragon_phone.generation import Request
from neodragon_phone.text import encode, tower_ids

from export.bundle.contents import Draft
from export.bundle.host_tables import write_tokenizer
from neodragon_jax.checkpoint import shipped
from neodragon_jax.generation.tokens import CLIP_LENGTH, Tokenizers
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


@pytest.mark.parametrize('root', [shipped.find('moving_shapes'), TINY_CHECKPOINT], ids=['shipped', 'released'])
def test_tokens_are_the_checkpoints(root, tmp_path):
    """CLIP's text is repaired and T5's is not. The second checkpoint has parts of the released vocabularies."""
    tokenizers = Tokenizers.load(root)
    expected, draft = tokenizers(PROMPTS), Draft(tmp_path)
    lengths = {'clip_l': CLIP_LENGTH, 'clip_g': CLIP_LENGTH, 't5': tokenizers.t5.length}
    entries = {
        name: {'tokenizer': write_tokenizer(draft, name, getattr(tokenizers, name).backend, length), 'tokens': length}
        for name, length in lengths.items()
    }
    for index, prompt in enumerate(PROMPTS):
        for name, ids in (('clip_l', expected.clip_l_ids), ('clip_g', expected.clip_g_ids)):
            np.testing.assert_array_equal(tower_ids(Folder(tmp_path), entries[name], prompt), ids[index], prompt)
        ids, mask = encode(Folder(tmp_path), entries['t5'], prompt)
        np.testing.assert_array_equal(ids, expected.t5_ids[index], prompt)
        np.testing.assert_array_equal(mask, expected.t5_mask[index], prompt)


def test_a_prompt_that_is_no_unicode_is_refused():
    """Python decodes bytes of a command line that are not UTF-8 to lone surrogates."""
    with pytest.raises(BundleError, match='--prompt: has bytes that are not UTF-8'):
        Request('a caf\udce9')
