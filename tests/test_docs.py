"""Documents are true: commands exist and take the options and settings shown, links have targets, help has examples."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import pathlib
import re
import runpy
import sys
from collections.abc import Iterator

import pytest

from configs import dmd as dmd_settings
from neodragon_jax.generation.defaults import RELEASED
from support.goldens import ROOT
from train.dmd.provenance import FIRST_FRAMES
from train.flow.first_frames import PICTURES, SOURCES

DOCUMENTS = sorted(
    path
    for pattern in (
        '*.md',
        'docs/**/*.md',
        'neodragon_jax/*.md',
        'train/*.md',
        'export/*.md',
        'configs/*.md',
        'tests/*.md',
    )
    for path in ROOT.glob(pattern)
)


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every `python -m MODULE ...` in code blocks and code spans, MODULE first."""
    blocks = re.findall(r'```\w*\n(.*?)```', text, flags=re.S) + re.findall(r'`([^`\n]*(?:\n[^`\n]+)?)`', text)
    for block in blocks:
        for line in re.sub(r'\\\n\s*', ' ', block).splitlines():
            for command in re.findall(r"python3? -m ([^|&>;'`()]*)", line.partition('  #')[0]):
                words = command.split()
                # The words after the launcher's `--` are a separate command.
                if '--' in words:
                    yield words[words.index('--') + 1 :]
                    words = words[: words.index('--')]
                if (
                    words
                    and 'PROGRAM' not in words[0]
                    and words[0].split('.')[0] in ('neodragon_jax', 'train', 'export')
                ):
                    yield words


def options(words: list[str]) -> set[str]:
    """Return the names of a command's options."""
    return {word.partition('=')[0] for word in words[1:] if word.startswith('--')}


@functools.cache
def shown_help(module: str, *arguments: str) -> str:
    """Return the output of `python -m module --help`."""
    shown = io.StringIO()
    before = sys.argv
    sys.argv = [module, *arguments, '--help']
    try:
        with contextlib.redirect_stdout(shown):
            runpy.run_module(module, run_name='__main__', alter_sys=True)
    except SystemExit as end:
        assert not end.code, f'python -m {module} --help has status {end.code}'
    finally:
        sys.argv = before
    return shown.getvalue()


def shown_options(module: str, *arguments: str) -> set[str]:
    """Return the options that `python -m module --help` shows."""
    return set(re.findall(r'--[a-z][a-z0-9-]*', shown_help(module, *arguments)))


def parser_commands() -> list[str]:
    """Return the commands that parse their options with argparse; programs with settings files are not among them."""
    paths = (path for package in ('neodragon_jax', 'train', 'export') for path in (ROOT / package).rglob('*.py'))
    found = (path for path in paths if 'add_argument' in path.read_text() and '__main__' in path.read_text())
    names = (
        '.'.join(path.relative_to(ROOT).with_suffix('').parts)
        for path in found
        if 'player' not in path.relative_to(ROOT).parts
    )
    return sorted(name.removesuffix('.__main__') for name in names)


@pytest.mark.parametrize('module', parser_commands())
def test_help_teaches(module):
    """It has an example, and every option has an explanation besides its default."""
    text = shown_help(module)
    assert re.search(rf'(?m)^(?!usage:).*python -m {module}', text)
    assert not re.findall(r'(?m)^\s+(?:--?\S.*  )?default: .*', text)


def test_documents_are_found():
    assert ROOT / 'README.md' in DOCUMENTS and ROOT / 'docs' / 'architecture.md' in DOCUMENTS


def all_commands() -> dict[str, list[list[str]]]:
    """Return every command of the documents by module; the settings files' docstrings are documents, too."""
    settings = sorted(path for path in (ROOT / 'configs').glob('*.py') if path.name != '__init__.py')
    found: dict[str, list[list[str]]] = {}
    for path in [*DOCUMENTS, *settings]:
        text = path.read_text()
        if path.suffix == '.py':
            text = '```\n' + text.split('"""')[1] + '```'
        for words in commands(text):
            found.setdefault(words[0], []).append(words)
    return found


def setting_exists(settings, key: str) -> bool:
    """Tell whether a ConfigDict has a dotted key."""
    for part in key.split('.'):
        if part not in settings:
            return False
        settings = settings[part]
    return True


def test_settings_shown_exist():
    checked = 0
    for lines in all_commands().values():
        for words in lines:
            given = [word for word in words if word.startswith('--config=')]
            if not given:
                continue
            name, _, preset = given[0].removeprefix('--config=').partition(':')
            if not (ROOT / name).is_file():
                assert name in ('...', 'configs/PROGRAM.py'), f'{name} in {words}'
                continue
            module = importlib.import_module(name.removesuffix('.py').replace('/', '.'))
            settings = module.get_config(preset) if preset else module.get_config()
            for key in (word[9:].partition('=')[0] for word in words if word.startswith('--config.')):
                assert setting_exists(settings, key), f'{key} in {words}'
                checked += 1
    assert checked > 10


def test_samples_shown_suit_the_distillation_shown():
    """Each distillation takes the samples of the command above it, of a checkpoint in the released layout."""
    # Not at the top: the tests of --help run this module as a command.
    from train import teacher_samples

    checked = 0
    for path in DOCUMENTS:
        source = ''
        for module, *words in commands(path.read_text()):
            if module == 'train.teacher_samples' and '--count' in words:
                chosen = teacher_samples.parse_options([word.replace('BUCKET', 'bucket') for word in words])
                given = chosen.first_frame or SOURCES[RELEASED.hybrid.first_frame]
                source = given if isinstance(given, str) else PICTURES
            if module == 'train.dmd' and source:
                (name,) = (word for word in words if word.startswith('--config='))
                protocol = dmd_settings.get_config(*name.split(':')[1:]).dmd.protocol
                assert source in FIRST_FRAMES[protocol], f'{path}: {words}'
                checked += 1
    assert checked > 2


def test_options_shown_exist():
    checked = 0
    for module, lines in sorted(all_commands().items()):
        if any(word.startswith('--config=') for words in lines for word in words):
            assert importlib.util.find_spec(module), module
            continue
        subcommands = {tuple(words[1:2]) if module == 'train.prune' else () for words in lines}
        known: set[str] = set().union(*(shown_options(module, *name) for name in subcommands))
        for words in lines:
            assert options(words) <= known, f'{sorted(options(words) - known)} in {words}'
            checked += 1
    assert checked > 10


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: pathlib.Path):
    for target in re.findall(r'\]\(([^)#\s]+)', document.read_text()):
        if not target.startswith(('http://', 'https://')):
            assert (document.parent / target).exists(), target


def headings(document: pathlib.Path) -> set[str]:
    """Return the anchors of a document's headings, as the site and GitHub make them."""
    text = re.sub(r'(?ms)^```.*?^```', '', document.read_text())
    titles = (re.sub(r'[^\w\s-]', '', title).strip().lower() for title in re.findall(r'(?m)^#+ (.*)$', text))
    return {re.sub(r'[\s-]+', '-', title) for title in titles}


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_headings(document: pathlib.Path):
    for target, anchor in re.findall(r'\]\(([^)#\s]*)#([^)\s]+)\)', document.read_text()):
        if not target.startswith(('http://', 'https://')):
            assert anchor in headings(document.parent / target if target else document), f'{target}#{anchor}'


def test_every_page_is_in_the_navigation():
    """A page that the site's menu does not name is found by a search only."""
    pages = {str(path.relative_to(ROOT / 'docs')) for path in (ROOT / 'docs').rglob('*.md')}
    named = re.findall(r'(?m)^ +- [^:\n]+: (\S+\.md)$', (ROOT / 'mkdocs.yml').read_text())
    assert sorted(named) == sorted(pages)


@pytest.mark.parametrize('package', ['neodragon_jax', 'train', 'export', 'configs', 'tests'])
def test_every_room_is_in_one_row(package):
    """The tables of a folder's README name each of its files and folders once."""
    folder = ROOT / package
    rows = '\n'.join(line for line in (folder / 'README.md').read_text().splitlines() if line.startswith('|'))
    for path in folder.iterdir():
        if path.name[0] not in '._' and path.name != 'README.md':
            names = (f'`{path.name}/`',) if path.is_dir() else (f'`{path.name}`', f'{package}.{path.stem}`')
            assert sum(rows.count(name) for name in names) == 1, path.name


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_text().split()) < 900
