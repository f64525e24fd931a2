"""Figures of the report: the numbers of a finding with their errors, and the curves of trainings."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import matplotlib.figure

from neodragon_jax.base.atomic import atomic_file
from train.runtime.metrics import read_metrics
from train.shapes.attributes import Estimate

# Metrics whose curves are drawn: every program's loss and evaluation metrics.
TRAINING = ('loss', 'eval/validation', 'eval/psnr', 'fake_mse', 'cauchy')
DPI = 100
# Width of the fan of all series at one x, as a share of the axis.
FAN = 0.03
# Numbers of x that are all named below the axis.
MOST_TICKS = 10


@dataclasses.dataclass(frozen=True)
class Curves:
    """Numbers over steps or units, a panel for each number.

    Attributes:
      panels: title -> series -> its number at each x.
      levels: title -> name of a system without an x -> its number, drawn as a level line.
    """

    x: Sequence[float]
    label: str
    panels: Mapping[str, Mapping[str, Sequence[Estimate]]]
    levels: Mapping[str, Mapping[str, Estimate]] = dataclasses.field(default_factory=dict)

    def figure(self) -> matplotlib.figure.Figure:
        """Return the panels side by side, with error bars."""
        figure = matplotlib.figure.Figure(figsize=(5 * len(self.panels), 3.2), layout='constrained')
        for place, (title, series) in enumerate(self.panels.items(), start=1):
            axes = figure.add_subplot(1, len(self.panels), place, title=title, xlabel=self.label)
            for number, (name, values) in enumerate(series.items()):
                means, errors = zip(*values, strict=True)
                # Series lie beside each other, so that their bars stay apart.
                shift = FAN * (max(self.x) - min(self.x)) * ((number + 0.5) / len(series) - 0.5)
                beside = [x + shift for x in self.x]
                axes.errorbar(beside, means, errors, label=name, marker='o', markersize=3, capsize=2)
            for number, (name, value) in enumerate(self.levels.get(title, {}).items()):
                axes.axhline(value.mean, label=name, linestyle=(':', '--')[number % 2], color='gray')
            if len(self.x) <= MOST_TICKS:
                axes.set_xticks(self.x)
            axes.grid(alpha=0.3)
        return _with_legend(figure)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Numbers of systems, a panel for each number and a row for each system.

    Attributes:
      panels: title -> series -> system -> number.
    """

    panels: Mapping[str, Mapping[str, Mapping[str, Estimate]]]

    def figure(self) -> matplotlib.figure.Figure:
        """Return the panels side by side, with error bars; the systems are named once."""
        systems = list(
            dict.fromkeys(name for series in self.panels.values() for rows in series.values() for name in rows)
        )
        size = 2 + 3 * len(self.panels), 1 + 0.25 * len(systems)
        figure = matplotlib.figure.Figure(figsize=size, layout='constrained')
        for place, (title, series) in enumerate(self.panels.items(), start=1):
            axes = figure.add_subplot(1, len(self.panels), place, title=title)
            for number, (name, rows) in enumerate(series.items()):
                means, errors = zip(*rows.values(), strict=True)
                places = [systems.index(row) + 0.15 * (number - (len(series) - 1) / 2) for row in rows]
                axes.errorbar(means, places, xerr=errors, label=name, fmt='o', markersize=4, capsize=2)
            axes.set_yticks(range(len(systems)), systems if place == 1 else [''] * len(systems))
            axes.invert_yaxis()
            axes.grid(alpha=0.3)
        return _with_legend(figure)


def _with_legend(figure: matplotlib.figure.Figure) -> matplotlib.figure.Figure:
    """Name the series of all panels once, beside them."""
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize='small', loc='outside right center')
    return figure


def save(figure: matplotlib.figure.Figure, path: pathlib.Path) -> None:
    """Write a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as draft:
        figure.savefig(draft, format='png', dpi=DPI)


def draw_training(metrics: pathlib.Path, out: pathlib.Path) -> None:
    """Draw a program's logged metrics over its steps."""
    rows = read_metrics(metrics.parent)
    curves = {name: [(row['step'], row[name]) for row in rows if row.get(name) is not None] for name in TRAINING}
    shown = {name: points for name, points in curves.items() if points}
    if not shown:
        return
    figure = matplotlib.figure.Figure(figsize=(4 * len(shown), 2.6), layout='constrained')
    for place, (name, points) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(1, len(shown), place, title=f'{metrics.parent.name}: {name}', xlabel='step')
        axes.plot(*zip(*points, strict=True))
        axes.grid(alpha=0.3)
    save(figure, out)
