"""A stage of the denoiser in several forms, each quantized, compiled and counted.

All forms compute the same function, see graphs/denoiser.py. Weights are random, because the counts do not depend on
them. Two graphs are built: one with one block (the last, with embedding and head) and one with two blocks. Their
difference is one block. The counts of a model with N blocks are those of the first graph plus N - 1 differences. This
is exact, because all other blocks are equal.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from export.graphs.denoiser import Form, denoiser_graphs
from export.graphs.runners import OnnxSession
from export.graphs.table import Feeds
from export.host.denoiser_host import DenoiserHost
from export.measure.snr import snr_db
from export.qnn.chipsets import Target
from export.qnn.compile import provider_options
from export.qnn.htp import HtpSession
from export.qnn.latency import Estimate, estimate
from export.qnn.static_view import StaticView, dump_options, extrapolate, read_view
from export.quantize.qdq import to_w8a16
from export.quantize.stitch import export_chain, quantize_chain
from neodragon_jax.checkpoint.random_params import random_params
from neodragon_jax.config.neodragon import FULL, MMDiTConfig
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.pyramid.history import envelope_history
from neodragon_jax.pyramid.sampler import Prompt
from neodragon_jax.pyramid.stages import levels

BASELINE = 'straightforward'


@dataclasses.dataclass(frozen=True)
class StageSizes:
    """Sizes of the graph of a stage.

    Attributes:
      stages: number of pyramid stages.
      units: number of latent frames after the first, which sets the length of the history.
      grid: rows and columns of patches of a full-size latent frame.
      text_tokens: number of text tokens.
    """

    stages: int = 3
    units: int = 6
    grid: tuple[int, int] = (20, 32)
    text_tokens: int = 128


RELEASED = StageSizes()


def released_config(heads: int) -> MMDiTConfig:
    """Return the released denoiser with fewer attention heads of 64 dimensions, for a quick trial; it has 24."""
    width = heads * FULL.denoiser.attention_head_dim
    return dataclasses.replace(FULL.denoiser, num_attention_heads=heads, caption_projection_dim=width)


@dataclasses.dataclass(frozen=True)
class CompiledForm:
    """The counts, ratio and build cost of one graph."""

    view: StaticView
    quantized_db: float
    quantize_s: float
    compile_s: float
    compile_gb: float


@dataclasses.dataclass(frozen=True)
class FormRow:
    """A form of the whole model: extrapolated counts and latency, and the built graph of two blocks."""

    form: str
    view: StaticView
    estimate: Estimate
    built: CompiledForm

    @property
    def bytes_mb(self) -> float:
        """Megabytes that one call moves: the outputs of operations and the weights."""
        return self.view.moved_mb + self.view.weights_mb


def compare_forms(
    config: MMDiTConfig,
    forms: Mapping[str, Form],
    stage: int,
    target: Target,
    blocks: int,
    sizes: StageSizes,
    on_graph: Callable[[str], object],
) -> Iterator[FormRow]:
    """Yield one row per form of a model with `blocks` blocks.

    Args:
      config: configuration of the model; its number of blocks is ignored.
      on_graph: called with one line per built graph.
    """
    for name, form in forms.items():

        def built(count: int, name: str = name, form: Form = form) -> CompiledForm:
            compiled = build(dataclasses.replace(config, num_layers=count), form, stage, target, sizes)
            on_graph(f'{name}, {count} blocks')
            return compiled

        yield form_row(name, built, blocks)


def form_row(name: str, built: Callable[[int], CompiledForm], blocks: int) -> FormRow:
    """Return the row of a form, extrapolated from its graphs of one and of two blocks."""
    short, long = built(1), built(2)
    view = extrapolate(short.view, long.view, blocks - 1)
    return FormRow(name, view, estimate(view), long)


def build(config: MMDiTConfig, form: Form, stage: int, target: Target, sizes: StageSizes) -> CompiledForm:
    """Quantize a stage with random weights on one random call, compile it, and count operations and bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        quantized = quantize_stage(config, form, stage, sizes, folder)
        (folder / 'dump').mkdir()
        options = provider_options(target, 'w8a16') | dump_options(folder / 'dump')
        with HtpSession(quantized.path, options) as session:
            opened = session.opened
        view = read_view(folder / 'dump')
    return CompiledForm(view, quantized.db, quantized.seconds, opened.seconds, opened.peak_gb)


class QuantizedStage(NamedTuple):
    """A W8A16 graph: its file, ratio on the call it was calibrated on, and the time it took."""

    path: pathlib.Path
    db: float
    seconds: float


def quantize_stage(
    config: MMDiTConfig, form: Form, stage: int, sizes: StageSizes, folder: pathlib.Path
) -> QuantizedStage:
    """Write the W8A16 graph of a stage with random weights, calibrated on one random call, into a folder."""
    model, params = PyramidMMDiT(config), random_params('PyramidMMDiT', config, seed=0)
    graph = denoiser_graphs(model, params, sizes.units, sizes.grid, sizes.text_tokens, sizes.stages, form)[stage]
    call = random_call(DenoiserHost(model, params, form), config, stage, sizes)
    plain, path = folder / 'float.onnx', folder / f'{graph.name}.onnx'
    export_chain(graph, plain)
    want = OnnxSession(plain).run(call)['flow']
    for file in folder.glob(f'{plain.name}*'):
        file.unlink()
    start = time.monotonic()
    quantize_chain(graph, path, [call], to_w8a16)
    seconds = time.monotonic() - start
    return QuantizedStage(path, snr_db(want, OnnxSession(path).run(call)['flow']), seconds)


def random_call(host: DenoiserHost, config: MMDiTConfig, stage: int, sizes: StageSizes) -> Feeds:
    """Return the inputs of a stage's graph for a random call at the last unit."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    rows, columns = (side * config.patch_size for side in sizes.grid)
    pyramid = levels(draw(1, sizes.units + 1, rows, columns, config.in_channels), sizes.stages)
    unit = jnp.array([sizes.units])
    mask = (jnp.arange(sizes.text_tokens) < sizes.text_tokens // 2)[None].astype(jnp.int32)
    prompt = Prompt(draw(1, sizes.text_tokens, config.width), mask, draw(1, config.pooled_projection_dim))
    history = envelope_history(pyramid, unit, stage, sizes.units)
    return host.stage_inputs(history, pyramid[stage][:, -1:], unit, prompt, jnp.array([700.0]))
