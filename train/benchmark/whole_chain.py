"""The commands that train the whole system from random weights.

autoencoder -> { small decoder, latents -> teacher -> { pruning, text } } -> samples -> students -> evaluation
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator

from train.benchmark.chain import (
    ADAPTER,
    AUTOENCODER,
    DENOISER,
    LANGUAGE,
    TEXT_ENCODER,
    VAE,
    WITH_EMBEDDER,
    Chain,
    Step,
)
from train.shapes.text_encoders import TEACHER_ENCODER


@dataclasses.dataclass(frozen=True)
class WholeChain(Chain):
    """The folders and commands of one seed."""

    @property
    def teacher_text(self) -> pathlib.Path:
        """The checkpoint with the teacher's own text encoder."""
        return self.folder / 'teacher_checkpoint'

    @property
    def without_cosine(self) -> pathlib.Path:
        """The checkpoint with the text encoder that was distilled without the cosine term."""
        return self.folder / 'without_cosine_checkpoint'

    def steps(self) -> list[Step]:
        """Return all commands in order."""
        pruning = self._pruning() if self.tier.ablations else ()
        steps = [*self._autoencoder(), *self._teacher(), *self._text(), *pruning, *self._students()]
        return [*steps, self._evaluation(tuple(step.result for step in steps))]

    def _autoencoder(self) -> Iterator[Step]:
        language = self.out / 'language'
        yield self._language()
        yield self._clips('scenes', self.tier.clips, self.tier.size, seed=1)
        native = self.out / 'autoencoder' / 'result' / AUTOENCODER
        data = f'--config.data=shapes:{self.tier.world}'
        yield self._train('autoencoder', self.out / 'autoencoder', native, [data], seed=0)
        start = [data, f'--config.decoder.start={native}']
        yield self._train('decoder', self.out / 'decoder', self._small_vae, start, seed=0)
        # Latents need the encoder only; both autoencoders share it.
        base = self.out / 'base_checkpoint'
        parts = {base / name: language / name for name in LANGUAGE}
        parts[base / VAE] = native
        text = ['--text', 't5', '--text-encoder', str(language / TEACHER_ENCODER)]
        yield self._latents('latents', 'scenes', base, 8, text)._replace(parts=parts)

    def _teacher(self) -> Iterator[Step]:
        arguments = [self._data, *([self._half_at_first] if self.tier.half_at_first else ())]
        yield self._train('teacher', self.folder / 'teacher', self.result('teacher') / WITH_EMBEDDER, arguments)

    def _text(self) -> Iterator[Step]:
        language = self.out / 'language'
        yield self._prompts(self.out / 'base_checkpoint')
        common = [
            f'--config.data={self.out / "prompts"}',
            f'--config.teacher={language / TEACHER_ENCODER}',
            f'--config.embedder={self.result("teacher") / WITH_EMBEDDER}',
            f'--config.encoder={language / TEXT_ENCODER}',
        ]
        variants = {'text': []}
        if self.tier.ablations:
            variants['text_without_cosine'] = ['--config.text.cosine_weight=0.0']
        for name, changes in variants.items():
            yield self._train('text', self.folder / name, self.result(name) / ADAPTER, [*common, *changes], name)

    def _pruning(self) -> Iterator[Step]:
        full, choice = self.result('teacher') / WITH_EMBEDDER, self.folder / 'choice'
        yield self._importance(full, removed=1)
        common = [f'--config.denoiser={full}', f'--config.keep={choice / "keep.json"}', self._data]
        start = [f'--config.start={self.result("stage1") / WITH_EMBEDDER}']
        for name, stage, more in (('stage1', 1, []), ('stage2', 2, start), ('stage2_alone', 2, [])):
            yield self._train(
                'pruning', self.folder / name, self.result(name) / DENOISER, [*common, *more], name, f'stage{stage}'
            )

    def _students(self) -> Iterator[Step]:
        base, teacher, text = self.out / 'base_checkpoint', self.result('teacher'), self.result('text')
        parts = {self.distilled_text / name: base / name for name in LANGUAGE} | {
            self.distilled_text / VAE: self._small_vae
        }
        parts |= {self.distilled_text / DENOISER: teacher / DENOISER, self.distilled_text / ADAPTER: text / ADAPTER}
        parts[self.distilled_text / TEXT_ENCODER] = text / TEXT_ENCODER
        for root in (self.teacher_text, self.without_cosine) if self.tier.ablations else (self.teacher_text,):
            parts |= {root / name: base / name for name in LANGUAGE} | {root / VAE: self._small_vae}
        if self.tier.ablations:
            parts[self.without_cosine / TEXT_ENCODER] = self.result('text_without_cosine') / TEXT_ENCODER
        parts |= {self.teacher_text / DENOISER: teacher / DENOISER, self.teacher_text / ADAPTER: teacher / ADAPTER}
        parts[self.teacher_text / TEXT_ENCODER] = self.out / 'language' / TEACHER_ENCODER
        yield self._samples(parts)
        for name in self.students:
            yield self._student(name)

    @property
    def _small_vae(self) -> pathlib.Path:
        """The video VAE with the small decoder."""
        return self.out / 'decoder' / 'result' / VAE
