"""Tests of all commands: paths as typed, outputs that cannot be written, and the settings that are paths."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib
import os
import pathlib
import re
import time
import typing

import pytest

from neodragon_jax.base.command_line import EXIT_CODES, PathOption, exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.output import output_folder
from support.goldens import TINY_CHECKPOINT
from train.runtime import settings as run_settings
from train.runtime.runner import recipe_of

ROOT = pathlib.Path(__file__).parents[1]
# Programs with a settings file, and its smallest preset.
PROGRAMS = dict.fromkeys(('autoencoder', 'decoder', 'dmd', 'super_resolution', 'teacher', 'text'), 'tiny')
PROGRAMS['pruning'] = 'stage1-tiny'
# Started by other commands, not by users; or configured by flags and a settings file.
NO_PARSER = {f'train.{name}' for name in (*PROGRAMS, 'aot', 'aot.worker')}
NO_PARSER |= {'export.qnn.htp_worker', 'export.quantize.adaround_worker'}
NO_PARSER |= {f'train.measure.against_torch.{side}_worker' for side in ('jax', 'torch')}
# Sample sets may be in a bucket: SampleSource reads the path.
SAMPLE_SETS = {('train.text_states', '--data'), ('train.prune', '--data'), ('train.measure.loader', '--data')}


# Their `main` has no parameter.
WITHOUT_ARGUMENTS = ('neodragon_jax.sizes', 'train.tpu_flags')


class Captured(BaseException):
    """The parser of a command, at the moment when it would parse."""


def commands() -> list[str]:
    """Return the modules of all commands that parse a command line."""
    found = []
    for package in ('neodragon_jax', 'train', 'export'):
        for path in sorted((ROOT / package).rglob('*.py')):
            if "if __name__ == '__main__'" in path.read_text() and 'player' not in path.relative_to(ROOT).parts:
                found.append('.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__main__'))
    return [name for name in found if name not in NO_PARSER]


def module_of(name: str):
    path = ROOT.joinpath(*name.split('.'))
    return importlib.import_module(f'{name}.__main__' if path.is_dir() else name)


def run(name: str, argv: list[str]) -> int:
    return module_of(name).main(argv)


def whole_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command."""

    def capture(parser, *args, **kwargs):
        raise Captured(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, 'parse_args', capture)
        patch.setattr('sys.argv', [name])
        with pytest.raises(Captured) as caught:
            module = module_of(name)
            module.main() if name in WITHOUT_ARGUMENTS else module.main([])
    return caught.value.args[0]


def parsers(name: str) -> dict[str, argparse.ArgumentParser]:
    """Return the parser of a command by '', or those of its subcommands by name."""
    parser = whole_parser(name)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {'': parser}


@pytest.mark.parametrize('name', commands())
def test_help_ends_with_the_one_table_of_exit_statuses(name):
    """A command may add a line of its own, and says nothing else about its status."""
    heading, *lines = EXIT_CODES.splitlines()
    text, _, table = whole_parser(name).format_help().partition(f'\n{heading}\n')
    own = [line for line in table.splitlines() if line not in lines]
    assert [line for line in table.splitlines() if line in lines] == lines
    assert len(own) <= 1 and all(re.match(r'  (1|N)    \w', line) for line in own)
    assert 'exit status' not in text.lower()


def takes_path(action: argparse.Action) -> bool:
    return bool(re.search(r'\b(DIR|FILE|ONNX)|_DIR\b', str(action.metavar)))


def label(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar)


def arguments(parser: argparse.ArgumentParser, command: str, given: argparse.Action, text: str) -> list[str]:
    """Return a command line with one path, and any value for other required options."""
    line = [command] if command else []
    for action in parser._actions:
        value = text if action is given else '1'
        if action is given or action.required:
            line += [f'{action.option_strings[0]}={value}'] if action.option_strings else [value]
    return line


@pytest.mark.parametrize('name', commands())
def test_every_path_is_read_by_one_rule(name):
    for parser in parsers(name).values():
        for action in parser._actions:
            if takes_path(action) and (name, label(action)) not in SAMPLE_SETS:
                assert isinstance(action, PathOption), f'{name} {label(action)}'


@pytest.mark.parametrize('name', commands())
def test_addresses_and_empty_paths_are_refused_before_any_work(name, capsys):
    for command, parser in parsers(name).items():
        for action in (action for action in parser._actions if isinstance(action, PathOption)):
            buckets = () if action._bucket else ('gs://bucket/x', 'GS://bucket/x')
            for text in (*buckets, 'gs:/bucket/x', 's3://bucket/x', 'https://host/x', ''):
                start = time.monotonic()
                assert run(name, arguments(parser, command, action, text)) == 2
                said = capsys.readouterr().err
                assert said.count('\n') == 1 and said.startswith(f'error: {label(action)} '), said
                assert text in said and time.monotonic() - start < 2


@pytest.mark.parametrize('name', commands())
def test_local_paths_are_as_typed(name, monkeypatch):
    monkeypatch.setenv('HOME', '/home/someone')
    for command, parser in parsers(name).items():
        for action in (action for action in parser._actions if isinstance(action, PathOption)):
            texts = {'~/x': '/home/someone/x', 'word:rest': 'word:rest', 'my dir/x': 'my dir/x', 'dir/../x': 'dir/../x'}
            for text, path in texts.items():
                line = arguments(parser, command, action, text)
                value = getattr(parser.parse_args(line[1:] if command else line), action.dest)
                assert value == pathlib.Path(path) or value == [pathlib.Path(path)], f'{name} {label(action)}'


# Commands whose seeds make keys of JAX, which takes a seed modulo 2^32: 0, 2^32 and 2^40 would give the same numbers.
SEEDED = {
    *('neodragon_jax', 'neodragon_jax.random_checkpoint', 'train.benchmark', 'train.latents', 'train.moving_shapes'),
    *('train.prune', 'train.random_teacher', 'train.shapes.language', 'train.shapes.read', 'train.teacher_samples'),
    'export',
}


@pytest.mark.parametrize('name', commands())
def test_every_seed_is_read_by_one_rule(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = False
    for command, parser in parsers(name).items():
        for action in (action for action in parser._actions if 'seed' in action.dest):
            found = True
            for seed in (-1, 2**32, 2**40):
                assert run(name, arguments(parser, command, action, str(seed))) == 2
                said = capsys.readouterr().err
                assert said.count('\n') == 1 and said.startswith(f'error: {label(action)} '), said
                assert str(seed) in said and '4294967295' in said
    assert found == (name in SEEDED) and not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', PROGRAMS)
def test_the_seed_of_a_training_run_is_read_by_the_same_rule(name):
    config = importlib.import_module(f'configs.{name}').get_config(PROGRAMS[name])
    for seed in (-1, 2**32, 2**40):
        config.seed = seed
        with pytest.raises(InputError, match='seed is'):
            recipe_of(name).read(config)


# --- Settings --------------------------------------------------------------------------------------------------------

# Read by LoopConfig.workdir, SampleSource and read_keep; the others are no paths.
READ_ELSEWHERE = {'workdir', 'data', 'keep'}
NO_PATHS = {'best_metric', 'layers', 'project', 'entity'}


NONE = dataclasses.MISSING


def text_fields(kind, where=''):
    """Yield (path of a setting, its type) of the text settings whose default is empty, or that have none."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, place = hints[field.name], f'{where}{field.name}'
        if dataclasses.is_dataclass(hint):
            yield from text_fields(hint, f'{place}.')
        elif hint in (str, run_settings.PathText, run_settings.CheckpointText) and field.default in ('', NONE):
            yield place, hint


@pytest.mark.parametrize('name', PROGRAMS)
def test_every_setting_that_is_a_path_is_read_by_one_rule(name):
    recipe, tested = recipe_of(name), 0
    config = importlib.import_module(f'configs.{name}').get_config(PROGRAMS[name])
    for place, kind in text_fields(recipe.settings):
        last = place.rpartition('.')[2]
        if kind is str:
            assert last in READ_ELSEWHERE | NO_PATHS, f'{place} is a text; is it a path?'
        section = config.copy_and_resolve_references()
        *sections, key = place.split('.')
        values = section
        for part in sections:
            values = values[part]
        if kind is str or key not in values:
            continue  # not a path, or set by the top level
        for text in ('gs:/bucket/x', 'S3://bucket/x', 'https://host/x'):
            with values.unlocked():
                values[key] = text
            with pytest.raises(InputError, match=re.escape(place)):
                recipe.read(section)
            tested += 1
    assert tested or name == 'super_resolution'


# --- Outputs that cannot be written ----------------------------------------------------------------------------------


def given(tmp_path: pathlib.Path) -> dict[str, list[str]]:
    """Return, for every command that writes, a command line whose inputs are good; OUT stands for the output."""
    (tmp_path / 'prompts.txt').write_text('a cat\n')
    for name in ('clips', 'videos', 'bundle'):
        (tmp_path / name).mkdir()
    (tmp_path / 'clips' / 'manifest.json').write_text('{}')
    (tmp_path / 'videos' / 'a cat-0.mp4').write_bytes(b'')
    checkpoint, prompts = ['--checkpoint', str(TINY_CHECKPOINT)], ['--prompts-file', str(tmp_path / 'prompts.txt')]
    out, file = ['--out', 'OUT'], str(tmp_path / 'prompts.txt')
    folder = lambda name: str(tmp_path / name)
    return {
        'neodragon_jax': [*checkpoint, *prompts, *out],
        'neodragon_jax.evaluate': [folder('videos'), '--json', 'OUT/metrics.json'],
        'neodragon_jax.random_checkpoint': ['--tokenizers', str(TINY_CHECKPOINT), '--size', 'tiny', *out],
        'train.captioned_clips': ['--videos', folder('videos'), *out],
        'train.latents': [*checkpoint, '--clips', folder('clips'), *out],
        'train.moving_shapes': ['--count', '1', *out],
        'train.prompts': [*checkpoint, '--file', file, *out],
        'train.prune': ['apply', '--denoiser', folder('clips'), '--keep', '0', *out],
        'train.random_teacher': out,
        'train.lpips_weights': ['--linear', file, '--backbone', file, '--out', 'OUT/lpips.safetensors'],
        'train.teacher_samples': [*checkpoint, *prompts, '--count', '1', *out],
        'train.shapes.language': out,
        'train.text_states': ['--data', folder('clips'), '--teacher', folder('clips'), *out],
        'train.benchmark': ['--fast', *out],
        'train.measure.against_torch': ['--tiny', '--sides', 'jax', *out],
        'export': [*checkpoint, *out],
        'export.compare_options': ['--full-size-stage', '0', *out],
        'export.compare_stage': out,
        'export.device': [folder('bundle'), '--serial', 'x', '--runtime', folder('bundle'), *out],
    }


READ_ONLY = {
    *('neodragon_jax.sizes', 'neodragon_jax.upload'),
    *('train.launch', 'train.measure.loader', 'train.measure.packing', 'train.measure.probes', 'train.tpu_flags'),
    # These write at most a cache.
    *(f'train.measure.{name}' for name in ('blocks', 'kernel', 'published_steps', 'sampler')),
    'train.shapes.read',
}
# How an output cannot be written: status and part of the message.
FAULTS = {
    'a file': (2, ''),
    'under a file': (2, ''),
    'full disk': (3, 'no space is left on the disk'),
    'no permission': (3, 'permission denied'),
    'read-only disk': (3, 'the disk is read-only'),
}


def fail_writes(monkeypatch, folder: pathlib.Path, number: int) -> None:
    """Make every write below a folder fail."""

    def failing(call, path_of):
        def replaced(*args, **kwargs):
            path = path_of(args)
            if path is not None and str(path).startswith(str(folder)):
                raise OSError(number, os.strerror(number), str(path))
            return call(*args, **kwargs)

        return replaced

    monkeypatch.setattr(pathlib.Path, 'write_bytes', failing(pathlib.Path.write_bytes, lambda args: args[0]))
    monkeypatch.setattr(os, 'pwrite', failing(os.pwrite, lambda args: os.readlink(f'/proc/self/fd/{args[0]}')))


@pytest.mark.parametrize('fault', FAULTS)
def test_outputs_that_cannot_be_written_are_refused_before_any_work(tmp_path, monkeypatch, capsys, fault):
    lines = given(tmp_path)
    assert set(lines) | READ_ONLY == set(commands())
    status, message = FAULTS[fault]
    (tmp_path / 'file').write_text('')
    out = {'a file': tmp_path / 'file', 'under a file': tmp_path / 'file' / 'out'}.get(fault, tmp_path / 'out')
    number = {'full disk': errno.ENOSPC, 'no permission': errno.EACCES, 'read-only disk': errno.EROFS}.get(fault)
    for name, line in lines.items():
        with monkeypatch.context() as patch:
            if number is not None:
                fail_writes(patch, out, number)
            start = time.monotonic()
            got = run(name, [word.replace('OUT', str(out)) for word in line])
        said = capsys.readouterr().err
        assert got == status or (got, status) == (3, 2), f'{name}: {said}'
        assert said.count('\n') == 1 and message in said and str(out) in said, f'{name}: {said}'
        assert time.monotonic() - start < 20, name
        assert not out.is_dir(), f'{name} leaves {list(out.iterdir())}'


@pytest.mark.parametrize('name', PROGRAMS)
def test_the_folder_of_a_training_run_is_tried_before_any_work(name, tmp_path, capsys, monkeypatch):
    config = importlib.import_module(f'configs.{name}').get_config(PROGRAMS[name])
    recipe = recipe_of(name)
    monkeypatch.setattr('train.runtime.runner.require', lambda settings, required: None)
    (tmp_path / 'file').write_text('')
    config.workdir = str(tmp_path / 'file')
    assert exit_status(lambda: recipe.run(config)) == 2
    assert f'{tmp_path}/file' in capsys.readouterr().err
    config.workdir = str(tmp_path / 'run')
    fail_writes(monkeypatch, tmp_path, errno.ENOSPC)
    assert exit_status(lambda: recipe.run(config)) == 3
    assert 'no space is left' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


# They write single files, which appear when complete; export takes its locks after it has read the checkpoint.
WITHOUT_LOCK = {'neodragon_jax.evaluate', 'export', 'export.compare_options', 'export.compare_stage', 'export.device'}
WITHOUT_LOCK |= {'train.measure.against_torch', 'train.lpips_weights'}


def test_a_folder_in_use_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    out = tmp_path / 'out'
    for name, line in given(tmp_path).items():
        if name not in WITHOUT_LOCK:
            with output_folder(out):
                assert run(name, [word.replace('OUT', str(out)) for word in line]) == 2, name
                said = capsys.readouterr().err
                assert said.count('\n') == 1 and f'{out}: this process writes into it already' in said, name
