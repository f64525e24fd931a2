"""Documents are true: commands exist and take the options and settings shown, links have targets, help has examples."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
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


def mentions(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield (module, option, the word after it or '') for the options that follow a module's name, also in prose."""
    text = re.sub(r'\\\n\s*', ' ', text)
    module, values = r'(?:train|export|neodragon_jax)(?:\.\w+)*', r'(?:[ =](?!train\.|export\.|neodragon_jax)[\w/.]+)*'
    for found in re.finditer(rf'\b({module})((?:\s+--[a-z][a-z-]*{values})+)', text):
        for option, value in re.findall(r'(--[a-z-]+)(?:[ =]([\w/]+))?', found[2]):
            yield found[1], option, value


def strings(path: pathlib.Path) -> Iterator[str]:
    """Yield the docstrings and all other texts of a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


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


def sources() -> list[pathlib.Path]:
    """Return our modules and settings files."""
    paths = (
        path for package in ('neodragon_jax', 'train', 'export', 'configs') for path in (ROOT / package).rglob('*.py')
    )
    return sorted(path for path in paths if 'player' not in path.relative_to(ROOT).parts)


def test_options_and_their_values_are_named_as_they_are():
    """In documents, docstrings and messages, also outside of command lines."""
    texts = [(path, path.read_text()) for path in DOCUMENTS] + [
        (path, text) for path in sources() for text in strings(path)
    ]
    known, checked = set(parser_commands()) - {'train.prune'}, 0
    for path, text in texts:
        for module, option, value in mentions(text):
            if module not in known:
                continue
            given = re.search(rf'{option} \{{([^}}]*)\}}', shown_help(module))
            assert option in shown_options(module), f'{path}: {module} {option}'
            if given and value and not value.isupper():
                assert value in given[1].split(','), f'{path}: {module} {option} {value}; it takes {given[1]}'
                checked += 1
    assert checked > 10


def docstrings(path: pathlib.Path) -> Iterator[str]:
    """Yield the docstrings of a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ''


@functools.cache
def rooms(package: str) -> frozenset[str]:
    """Return the folders of a package."""
    return frozenset(path.parent.name for path in (ROOT / package).glob('*/*.py'))


def packages_of(name: str, own: str) -> list[str]:
    """Return the packages in which a dotted name may begin: '' if it begins with one, [] if it is no module's."""
    first, last = name.split('.')[0], name.split('.')[-1]
    if last in ('json', 'py') or first == 'config':  # a file; or settings, which most functions call `config`
        return []
    if first in ('neodragon_jax', 'train', 'export', 'configs'):
        return ['']
    # The exporter does not know the trainings, nor the library either of them.
    below = {'neodragon_jax': ('neodragon_jax',), 'configs': ('train', 'neodragon_jax')}
    return [f'{package}.' for package in below.get(own, (own, 'neodragon_jax')) if first in rooms(package)]


def resolves(name: str) -> bool:
    """Return whether a dotted name is a module, or something in one."""
    parts = name.split('.')
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module('.'.join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part) and part not in getattr(found, '__annotations__', {}):
                return False
            found = getattr(found, part, None)
        return True
    return False


@pytest.mark.parametrize('path', sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_names_in_docstrings_lead_somewhere(path):
    package = path.relative_to(ROOT).parts[0]
    for name in re.findall(r'`((?:[A-Za-z_]\w*\.)+[A-Za-z_]\w*)(?:\(\))?`', '\n'.join(docstrings(path))):
        places = packages_of(name, package)
        if package == 'configs' and setting_exists(importlib.import_module(f'configs.{path.stem}').get_config(), name):
            continue
        assert not places or any(resolves(place + name) for place in places), name


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
