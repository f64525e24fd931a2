"""The reference pages are complete and true: settings, metrics, and messages that a page quotes."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import re
import runpy
import shutil
import subprocess

import jax
import pytest

from configs import dmd as dmd_settings
from neodragon_jax.checkpoint import folders, hub
from neodragon_jax.generation import defaults
from support.glossary import unexplained
from support.goldens import ROOT
from train.runtime.runner import recipe_of
from train.runtime.sharding import MeshConfig, make_mesh
from train.runtime.step import abstract_arguments, guarded_step

PAGES = [*(ROOT / 'docs' / 'reference').glob('*.md'), ROOT / 'docs' / 'how_to' / 'troubleshoot.md']
# A quoted message needs this share of its words from fixed parts of the code's messages of at least this length.
SHARE, SHORTEST = 0.45, 5


@functools.cache
def fragments() -> list[str]:
    """Return the fixed parts of all texts in the code, longest first."""
    found: set[str] = set()
    for package in ('neodragon_jax', 'train', 'export'):
        for path in (ROOT / package).rglob('*.py'):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and '\n' not in node.value:
                    found.add(' '.join(node.value.split()))
    return sorted((text for text in found if len(text) >= SHORTEST), key=len, reverse=True)


def quoted(text: str) -> list[str]:
    """Return the messages in the `text` blocks of a page; an indented line continues the one before it."""
    blocks = re.findall(r'(?ms)^```text\n(.*?)^```', text)
    return [' '.join(line.split()) for block in blocks for line in re.sub(r'\n +', ' ', block).splitlines()]


def plain_words(text: str) -> int:
    """Return the number of words without those that vary: names, numbers and paths."""
    return len(re.findall(r"(?<![^\s('\"])[a-z][a-z']*(?![^\s)'\".,:;])", text))


def fixed_share(message: str) -> float:
    """Return the share of a message's words that the code's texts cover."""
    left = message
    for fragment in fragments():
        left = left.replace(fragment, ' # ')
    return 1 - plain_words(left) / plain_words(message)


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.name)
def test_quoted_messages_are_those_of_the_code(page):
    """A message whose words have changed is not found by the user who searches for it."""
    wrong = [message for message in quoted(page.read_text()) if fixed_share(message) < SHARE]
    assert not wrong


def test_messages_are_quoted():
    assert len(quoted((ROOT / 'docs' / 'how_to' / 'troubleshoot.md').read_text())) > 15
    assert fixed_share('RUN: no such run. Pass another one, perhaps.') < SHARE


# --- Settings --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def maker():
    return runpy.run_path(str(ROOT / 'docs' / 'make_settings.py'))


def test_the_page_of_settings_is_made_from_the_code(maker):
    command = 'python docs/make_settings.py docs/reference/settings.md'
    assert (ROOT / 'docs' / 'reference' / 'settings.md').read_text() == maker['page'](), f'run {command}'


def test_every_setting_is_described(maker):
    assert {path.stem for path in (ROOT / 'configs').glob('[a-z]*.py')} == set(maker['PROGRAMS'])
    missing = [f'{name}: {path}' for name, root in maker['programs']().items() for path in maker['undescribed'](root)]
    assert not missing


# Constants of the released architecture, and what the denoiser to prune decides.
NOT_IN_FILES = {'MMDiTConfig', 'pruning.flow.sizes', 'pruning.flow.context_embedder', 'pruning.flow.start'}
# The seed of the crops is that of the run.
NOT_IN_FILES |= {'super_resolution.crops.seed'}


def test_settings_files_list_every_setting(maker):
    """ml_collections refuses a setting that the file does not list, even if the dataclass has it."""
    for name, root in maker['programs']().items():
        for section in maker['sections'](root):
            for field in dataclasses.fields(section.kind):
                path = '.'.join(part for part in (name, section.path, field.name) if part)
                if 'top_level' not in field.metadata and not {section.kind.__name__, path} & NOT_IN_FILES:
                    assert field.name in section.values, f'{path} is not in configs/{name}.py'


# --- Metrics ---------------------------------------------------------------------------------------------------------

# Recipes that together have every objective; tests of the programs check the names that their runs log.
RECIPES = {
    'tiny-adversarial': {'adversarial': {'r1': 1.0, 'r2': 1.0}, 'progressive': {'weight': 1.0}},
    'tiny-consistency': {},
}


def test_the_glossary_refuses_other_names():
    known = ['fake_mse', 'fake_mse/stage1/unit12', 'eval/motion/unit3', 'image/block23', 'eval/native_ssim', 'goodput']
    assert unexplained([*known, 'fake', 'eval/loss', 'fake_mse/level1']) == ['eval/loss', 'fake', 'fake_mse/level1']


@pytest.mark.long
@pytest.mark.parametrize('preset', RECIPES)
def test_every_metric_of_a_recipe_is_explained(preset):
    config = dmd_settings.get_config(preset)
    config.dmd.objectives.update(RECIPES[preset])
    program, source, run = recipe_of('dmd').size(config)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    arguments = abstract_arguments(program, program.frozen(), source, run, mesh)
    _, metrics = jax.eval_shape(functools.partial(guarded_step, program, 0), *arguments)
    assert len(metrics) > 10 and not unexplained(metrics)


# --- Papers ----------------------------------------------------------------------------------------------------------


def test_files_cite_the_paper_that_the_architecture_names():
    section = (ROOT / 'docs' / 'architecture.md').read_text().partition('## Paper to file\n')[2]
    parts = re.split(r'\(arXiv (\d+\.\d+)\)', section)[1:]
    checked = 0
    for paper, text in zip(parts[::2], parts[1::2], strict=True):
        for name in re.findall(r'`([^`]+)`', text):
            path = ROOT / name
            files = path.rglob('*.py') if path.is_dir() else [path]
            told = ' '.join(file.read_text() for file in files)
            assert paper in told or (paper == '2511.06055' and 'Neodragon, section' in told), f'{name}: {paper}'
            checked += 1
    assert checked > 20


# --- Files -----------------------------------------------------------------------------------------------------------

FILES = ROOT / 'docs' / 'reference' / 'files.md'


def code_blocks(language: str) -> list[str]:
    """Return the code blocks of the page of files in one language; '' for command lines."""
    return [code for name, code in re.findall(r'(?ms)^```(\w*)\n(.*?)^```', FILES.read_text()) if name == language]


def test_the_data_set_of_the_page_is_written_and_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    read, read_alone, write = code_blocks('python')
    for code in (write, read, read_alone):
        exec(code, {})
    shown = capsys.readouterr().out
    assert '24 ArraySpec' in shown and "(3, 8, 8, 16) b'a video number 0'" in shown and '\n8 ' in shown
    config = importlib.import_module('configs.teacher').get_config('tiny')
    config.data, config.teacher.evaluation.examples = 'OWN', 8
    program, source, _ = recipe_of('teacher').load(recipe_of('teacher').read(config))
    assert len(source) == 16 and source[0]['latents'].shape == (3, 8, 8, 16) and program.evaluation is not None


def test_the_checkpoint_of_the_page_is_assembled(tmp_path):
    (commands,) = (code for code in code_blocks('') if 'BASE=' in code)
    base, result = ROOT / 'neodragon_jax' / 'assets' / 'moving_shapes', tmp_path / 'RUN' / 'result'
    for name in (folders.STUDENT, folders.STUDENT_ADAPTER):
        shutil.copytree(base / name, result / name)
    script = commands.replace('BASE=neodragon_jax/assets/moving_shapes', f'BASE={base}').partition('python -m')[0]
    subprocess.run(['bash', '-e', '-c', script], cwd=tmp_path, check=True)
    assert defaults.read(tmp_path / 'MINE').of('hybrid').first_steps == (2, 2, 2)
    for mode in defaults.MODES:
        absent = {name for name in hub.needed_folders(mode, 'denoiser') if not (tmp_path / 'MINE' / name).is_dir()}
        assert absent == {folders.SAFETY_CHECKER, folders.FEATURE_EXTRACTOR}


def test_every_key_of_generation_json_is_explained():
    section = FILES.read_text().partition('## generation.json')[2].partition('\n## ')[0]
    cells = [line.split('|')[1] for line in section.splitlines() if line.startswith('| `')]
    explained = {name for cell in cells for name in re.findall(r'`(\w+)`', cell)}
    of_modes = {field.name for field in dataclasses.fields(defaults.ModeDefaults)} - {'given_first_frame'}
    of_file = {field.name for field in dataclasses.fields(defaults.GenerationDefaults)} - set(defaults.MODES)
    assert explained == of_modes | of_file | {'modes'}
