"""Damaged and malicious bundles: no crash, no unverified file, no path outside the folder."""

import copy
import hashlib
import json
import os
import pathlib
import random
import shutil

import pytest
from neodragon_phone import __main__ as command
from neodragon_phone.backends import open_backend
from neodragon_phone.bundle import Bundle
from neodragon_phone.errors import BundleError
from neodragon_phone.generation import Request, generate
from neodragon_phone.player import Player

# Numbers of edits by seed: a few by default, 1,000 more in slow tests.
EDITS = [(0, 40), *(pytest.param(seed, 250, marks=pytest.mark.slow) for seed in range(1, 5))]


@pytest.fixture
def folder(bundle_folder, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(bundle_folder, tmp_path / 'bundle'))


def sign(folder: pathlib.Path, manifest) -> None:
    """Write a manifest with its digest, as an attacker could."""
    content = json.dumps(manifest).encode()
    (folder / 'manifest.json').write_bytes(content)
    (folder / 'manifest.json.sha256').write_text(f'{hashlib.sha256(content).hexdigest()}  manifest.json\n')


def play(folder: pathlib.Path) -> None:
    bundle = Bundle.open(folder)
    player = Player(bundle, open_backend('cpu', bundle, None))
    generate(player, Request('a red circle'))


def message(folder: pathlib.Path) -> str:
    """Return the one-line error message for a rejected bundle."""
    with pytest.raises(BundleError) as caught:
        play(folder)
    text = str(caught.value)
    assert '\n' not in text and len(text) < 500
    return text


@pytest.mark.parametrize('change', [lambda line: line + 'x', lambda line: line[:64], lambda line: line[:-3]])
def test_damage_behind_the_digest_is_caught(folder, change):
    path = folder / 'manifest.json.sha256'
    path.write_text(change(path.read_text()))
    assert 'differs from manifest.json.sha256' in message(folder)


@pytest.mark.parametrize('kind', ['portable', 'tables', 'vectors', 'tokenizers', 'manifest.json'])
def test_one_flipped_bit_is_caught(folder, kind):
    path = next(path for path in sorted(folder.rglob('*')) if path.is_file() and kind in str(path))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert path.name in message(folder)


def test_a_flipped_bit_of_a_binary_is_caught_where_it_is_used(folder):
    path = next(folder.glob('binaries/*/*.bin'))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=path.name):
        Bundle.open(folder, 'sm8750')
    Bundle.open(folder)


@pytest.mark.parametrize(
    'name', ['../outside.bin', '/etc/hostname', 'tables/../../outside.bin', 'C:\\x', 'a//b', '', '.']
)
def test_no_path_leaves_the_bundle(folder, name):
    outside = folder.parent / 'outside.bin'
    outside.write_bytes(b'secret')
    manifest = json.loads((folder / 'manifest.json').read_text())
    tokenizer = manifest['text']['dt5']
    entry = {'bytes': 6, 'sha256': hashlib.sha256(b'secret').hexdigest()}
    tokenizer['tokenizer'], manifest['files'][name] = name, entry
    sign(folder, manifest)
    assert 'not a path inside the bundle' in message(folder)


def test_no_link_leaves_the_bundle(folder):
    path = folder / 'tokenizers/dt5.json'
    outside = folder.parent / 'outside.json'
    shutil.move(path, outside)
    os.symlink(outside, path)
    assert 'link that leaves the bundle' in message(folder)


@pytest.mark.parametrize(('version', 'remedy'), [(1, 'Export the bundle again'), (3, 'Update neodragon-phone')])
def test_a_bundle_of_another_version_is_told_from_a_damaged_one(folder, version, remedy):
    manifest = json.loads((folder / 'manifest.json').read_text())
    # Version 1 named the compared outputs of a recorded call `judged`.
    for graph in manifest['graphs'].values():
        graph['vector']['judged'] = graph['vector'].pop('compared')
    sign(folder, manifest | {'version': version})
    assert f'version {version}; this player reads version 2. {remedy}.' in message(folder)


def test_the_note_on_unsafe_content(folder, capsys):
    """Bundles of version 2 made before the key `safety` stay valid."""
    manifest = json.loads((folder / 'manifest.json').read_text())
    del manifest['safety']
    for safety, words in (
        ({}, 'content.'),
        ({'safety': {'checkpoint_has_checker': False}}, 'content.'),
        ({'safety': {'checkpoint_has_checker': True}}, "content: the checkpoint's safety checker is not part"),
    ):
        sign(folder, manifest | safety)
        assert command.main([str(folder), '--canary', 'none']) == 0
        assert f'Videos are not checked for unsafe {words}' in capsys.readouterr().out
    sign(folder, manifest | {'safety': {'checkpoint_has_checker': 1}})
    assert '"safety.checkpoint_has_checker" is 1, not true or false' in message(folder)


def test_only_verified_files_are_read(folder):
    bundle = Bundle.open(folder)
    with pytest.raises(BundleError, match='not a verified file'):
        bundle.path(next(iter(json.loads((folder / 'manifest.json').read_text())['binaries']))['file'])


def _places(value, path=()):
    """Yield the path of every value in a document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))


def _edit(manifest, rng: random.Random) -> None:
    """Change, remove or add one value."""
    # Choose the part first, so that the many tensors and files do not crowd out the other parts.
    part = rng.choice(sorted(manifest))
    path = (part, *rng.choice(list(_places(manifest[part]))))
    holder = manifest
    for key in path[:-1]:
        holder = holder[key]
    old = holder[path[-1]]
    number = isinstance(old, int | float)
    values = [None, True, '', '../x', 'x' * 10_000, -1, 0, 1, 2**31, 10**400, 1e308, float('nan'), [], {}, [[]],
              {'x': 1}, [0] * 1000, *([old + 1, old * 2, -old, old / 3] if number else [])]  # fmt: skip
    action = rng.random()
    if action < 0.15:
        del holder[path[-1]]
    elif action < 0.25 and isinstance(old, dict):
        old['unknown'] = rng.choice(values)
    else:
        holder[path[-1]] = copy.deepcopy(rng.choice(values))


def test_unknown_fields_are_ignored_whatever_their_type(folder):
    """A newer minor version may add them to any object."""
    manifest = json.loads((folder / 'manifest.json').read_text())
    stage, graph = manifest['denoiser']['stages'][-1], manifest['graphs']['video_decoder']
    tables = [table for unit in stage['units'] if unit for table in unit.values()]
    for holder in (manifest, manifest['text'], manifest['text']['dt5'], manifest['video'], manifest['vectors'],
                   manifest['vectors']['video'], manifest['denoiser'], stage, stage['steps'][0], graph,
                   graph['vector'], graph['inputs']['latent'], *tables):  # fmt: skip
        holder['unknown'] = {}
    assert tables
    sign(folder, manifest)
    play(folder)


def _damage(folder: pathlib.Path, rng: random.Random) -> pathlib.Path:
    """Damage one file; return its path."""
    path = rng.choice([path for path in sorted(folder.rglob('*')) if path.is_file()])
    content = bytearray(path.read_bytes())
    action = rng.randrange(4)
    if action == 0:
        path.unlink()
    elif action == 1:
        path.write_bytes(content[: rng.randrange(len(content))])
    elif action == 2:
        path.write_bytes(bytes(content) + b'x')
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    return path


def _used(path: pathlib.Path, folder: pathlib.Path) -> bool:
    """Return whether a run with the portable graphs reads a file."""
    return path.relative_to(folder).parts[0] not in ('binaries', 'README.md', 'LICENSE')


@pytest.mark.parametrize(('seed', 'edits'), EDITS)
def test_random_edits_are_refused_in_one_line_or_harmless(folder, bundle_folder, seed, edits):
    """Half of the edits damage files; half change the manifest and update its digest."""
    rng, original = random.Random(seed), json.loads((bundle_folder / 'manifest.json').read_text())
    refused = 0
    for number in range(edits):
        damaged = None
        if number % 2:
            manifest = copy.deepcopy(original)
            _edit(manifest, rng)
            sign(folder, manifest)
        else:
            damaged = _damage(folder, rng)
        try:
            play(folder)
            assert damaged is None or not _used(damaged, folder), damaged
        except BundleError as error:
            refused += 1
            assert '\n' not in str(error)
        for path in (damaged, folder / 'manifest.json', folder / 'manifest.json.sha256'):
            if path is not None:
                shutil.copyfile(bundle_folder / path.relative_to(folder), path)
    assert refused > edits // 4
