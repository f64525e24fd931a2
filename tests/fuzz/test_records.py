"""Mutated records: prompt files, settings of checkpoints and programs, logs of runs, steps of an export.

Seeded; a case fails if anything but the documented exceptions is raised, if it takes longer than LONGEST_S, or if a
value out of range is accepted. Bundles are in tests/export/player/test_damaged.py.
"""

from __future__ import annotations

import functools
import importlib
import json
import pathlib
import random
import unicodedata
from collections.abc import Callable

import pytest
from ml_collections import ConfigDict

from export.host.file_records import file_records
from export.phone.session import read_bundle
from export.steps.step_cache import METADATA, finished
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import model_card
from neodragon_jax.evaluation.prompt_files import read_prompts
from neodragon_jax.generation import defaults as generation
from neodragon_jax.generation.defaults import MAX_FRAMES, MAX_SIDE
from neodragon_jax.generation.student import with_student
from neodragon_jax.pyramid.spacings import MAX_STEPS
from support.mutations import TEXTS, change_value, mutated, outcome
from train.pruning.keep_list import read_keep
from train.runtime.metrics import read_metrics
from train.runtime.runner import recipe_of

CASES = 150
# Seeds by number of cases: one by default, more in a slow test.
SEEDS = [(0, CASES), pytest.param(1, 8 * CASES, marks=pytest.mark.slow)]

PROMPTS = {
    'txt': b'a cat\n\xef\xbb\xbfa "big" dog, running\r\nn\xc3\xa9 \xf0\x9f\x90\x89\n',
    'json': b'["a cat", {"prompt_en": "a dog"}, {"prompt": "a bird", "dimension": ["color"]}]',
    'jsonl': b'"a cat"\n{"prompt": "a dog, running"}\n{"caption": "a bird"}\n',
    'csv': b'n,prompt\n1,"a cat, running"\n2,a dog\n3,"two\nlines"\n',
    'tsv': b'n\tprompt\n1\ta cat\n2\ta dog\n',
}


@pytest.mark.parametrize(('seed', 'cases'), SEEDS)
@pytest.mark.parametrize('suffix', sorted(PROMPTS))
def test_mutated_prompt_files(tmp_path, suffix, seed, cases):
    path, rng = tmp_path / f'prompts.{suffix}', random.Random(f'{suffix} {seed}')
    for content in (*TEXTS, *(mutated(PROMPTS[suffix], rng) for _ in range(cases))):
        path.write_bytes(content)
        for prompt in outcome(lambda: read_prompts(path), InputError) or ():
            assert prompt and not any(unicodedata.category(letter) in ('Cc', 'Cs') for letter in prompt)
            prompt.encode()


GENERATION = {
    'mode': 'hybrid', 'frames': 17, 'height': 64, 'width': 64, 'prompt_modifier': '', 'negative_prompt': 'blurry',
    'modes': {'hybrid': {'first_frame': 'denoiser', 'spacing': 'even'}, 'monolithic': {'steps': [4, 5, 6]}},
    'prompts': 'shapes', 'example': 'a circle',
}  # fmt: skip
STUDENT = {'student_steps': [2, 2, 1], 'student_first_steps': [2, 2, 2], 'spacing': 'even', 'protocol': '21'}
KEEP = {'keep': [0, 1, 3], 'rounds': [[2, 0.5]]}


def check_defaults(values: generation.GenerationDefaults) -> None:
    assert 0 < values.frames <= MAX_FRAMES and 0 < values.height <= MAX_SIDE and 0 < values.width <= MAX_SIDE
    for mode in (values.hybrid, values.monolithic):
        assert all(type(count) is int and 0 < count <= MAX_STEPS for count in (*mode.steps, *mode.first_steps))
        assert all(scale is None or 0 <= scale <= 1000 for scale in (mode.guidance, mode.first_guidance))


def read_student(folder: pathlib.Path) -> None:
    check_defaults(with_student(generation.RELEASED, folder))


def read_blocks(folder: pathlib.Path) -> None:
    assert all(type(block) is int for block in read_keep(str(folder / 'keep.json')))


# Name of a file -> its content, and the function that reads its folder.
RECORDS: dict[str, tuple[dict, Callable[[pathlib.Path], object]]] = {
    'generation.json': (GENERATION, lambda folder: check_defaults(generation.read(folder))),
    'student.json': (STUDENT, read_student),
    'keep.json': (KEEP, read_blocks),
}


@pytest.mark.parametrize(('seed', 'cases'), SEEDS)
@pytest.mark.parametrize('name', sorted(RECORDS))
def test_mutated_records(tmp_path, name, seed, cases):
    values, read = RECORDS[name]
    path, rng = tmp_path / name, random.Random(f'{name} {seed}')
    whole = json.dumps(values).encode()
    path.write_bytes(whole)
    read(tmp_path)
    changed = (json.dumps(change_value(rng, values)).encode() for _ in range(cases))
    for content in (*TEXTS, *changed, *(mutated(whole, rng) for _ in range(cases))):
        path.write_bytes(content)
        outcome(lambda: read(tmp_path), InputError)


@pytest.mark.parametrize(('seed', 'cases'), SEEDS)
def test_mutated_logs_of_runs(tmp_path, seed, cases):
    rows = [{'step': step, 'loss': 0.5, 'unit': None} for step in range(1, 6)]
    content, rng = ''.join(json.dumps(row) + '\n' for row in rows).encode(), random.Random(seed)
    (tmp_path / 'result').mkdir()
    for _ in range(cases):
        (tmp_path / 'metrics.jsonl').write_bytes(mutated(content, rng))
        found = outcome(lambda: read_metrics(tmp_path), InputError) or []
        assert all(type(row['step']) is int for row in found)
        assert isinstance(outcome(lambda: model_card.read_metrics(tmp_path / 'result')), dict)


@pytest.mark.parametrize(('seed', 'cases'), SEEDS)
def test_mutated_steps_of_an_export(tmp_path, seed, cases, capsys):
    """A finished step is kept only if its record is whole; otherwise it is made again."""
    (tmp_path / 'graph.onnx').write_bytes(b'graph')
    source, rng = {'precision': 'w8a16', 'sizes': [1, 2]}, random.Random(seed)
    metadata = {'source': source, 'files': file_records(tmp_path), 'resources': {'seconds': 1.5}}
    (tmp_path / METADATA).write_text(json.dumps(metadata))
    assert finished(tmp_path, source) == metadata
    for number in range(cases):
        whole = json.dumps(metadata).encode()
        changed = json.dumps(change_value(rng, metadata)).encode() if number % 2 else mutated(whole, rng)
        (tmp_path / METADATA).write_bytes(changed)
        found = outcome(lambda: finished(tmp_path, source), InputError)
        assert found is None or (found['source'] == source and found['files'] == metadata['files'])
    capsys.readouterr()


@pytest.mark.parametrize(('seed', 'cases'), SEEDS)
def test_mutated_manifests_of_bundles_sent_to_a_phone(tmp_path, seed, cases):
    (tmp_path / 'graph.bin').write_bytes(b'graph')
    manifest = {'version': 1, 'files': file_records(tmp_path)}
    rng = random.Random(seed)
    for number in range(cases):
        whole = json.dumps(manifest).encode()
        changed = json.dumps(change_value(rng, manifest)).encode() if number % 2 else mutated(whole, rng)
        (tmp_path / 'manifest.json').write_bytes(changed)
        found = outcome(lambda: read_bundle(tmp_path), InputError)
        assert found is None or found['files'] == manifest['files']


def read_settings(recipe, values):
    return recipe.read(ConfigDict(values))


@pytest.mark.parametrize(('seed', 'cases'), SEEDS)
@pytest.mark.parametrize('name', ['dmd', 'teacher', 'text'])
def test_mutated_settings_of_programs(name, seed, cases):
    recipe, rng = recipe_of(name), random.Random(f'{name} {seed}')
    settings = importlib.import_module(f'configs.{name}').get_config('tiny').to_dict()
    accepted = 0
    for _ in range(cases):
        changed = change_value(rng, settings)
        accepted += outcome(functools.partial(read_settings, recipe, changed), InputError) is not None
    assert accepted < cases
