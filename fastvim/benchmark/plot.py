"""Images per second against image size, as a picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvim.benchmark.cases import size_name
from fastvim.benchmark.record import Record, Row
from fastvim.benchmark.tables import labels, rate_text
from fastvim.errors import UserError
from fastvim.storage import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The name of a series (its model, and what else distinguishes it) and its rows.
Series = dict[tuple[str, ...], list[Row]]

# Okabe and Ito's colours, told apart by colour-blind eyes as well; their yellow is too pale here.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = {"eager": "o", "compiled": "s", "graph": "^", "compiled-graph": "D"}
DASHES = ((4.0, 2.0), (1.2, 1.4))
INK, QUIET = "#1f2937", "#6b7280"
WIDTH, HEIGHT, BAR = 5.6, 3.6, 0.3  # inches of the axes, and of a bar


def draw(record: Record, path: Path) -> None:
    """Write the picture of a record's rows; the format follows from the name (needs matplotlib).

    Raises:
        UserError: no row has a time.
    """
    figure = draw_rates(record.device, record.rows)
    save_figure(path, figure, dpi=160, facecolor="white", bbox_inches="tight", pad_inches=0.16)


def draw_rates(device: str, rows: Iterable[Row]) -> Figure:
    """One line per series: this library's models solid, others dashed; bars if there is one size.

    Raises:
        UserError: no row has a time.
    """
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.failure is None and row.images_per_second is not None]
    if not timed:
        raise UserError("nothing to draw: no row has a time")
    series = _by_speed(labels(timed, batches=True))
    sides = {_side(row): size_name(row.size) for row in timed}
    height = HEIGHT if len(sides) > 1 else BAR * len(timed)
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1))
    if len(sides) > 1:
        styles = _styles(series)
        for key, line in series.items():
            _draw_line(axes, ", ".join(key), line, *styles[key[0]])
        _scale(axes, sides)
        _write_legend(axes, series)
    else:
        _draw_bars(axes, series)
    _write_title(axes, device, timed)
    return figure


def _side(row: Row) -> float:
    """Side of the square with the same number of pixels."""
    return float(np.sqrt(row.size[0] * row.size[1]))


def _rate(row: Row) -> float:
    assert row.images_per_second is not None
    return row.images_per_second


def _by_speed(series: Series) -> Series:
    """Fastest at the largest size first."""
    order = sorted(series, key=lambda key: -_rate(series[key][-1]))
    return {key: series[key] for key in order}


def _styles(series: Series) -> dict[str, tuple[str, Any]]:
    """Colour and line style of each model. Others do not share the colours of ours."""
    own = dict.fromkeys(key[0] for key, line in series.items() if line[0].ours)
    others = [m for m in dict.fromkeys(key[0] for key in series) if m not in own]
    styles: dict[str, tuple[str, Any]] = {
        model: (COLOURS[i % len(COLOURS)], "-") for i, model in enumerate(own)
    }
    rest = COLOURS[min(len(own), len(COLOURS) - 3) :]
    for i, model in enumerate(others):
        dashes = DASHES[i // len(rest) % len(DASHES)]
        styles[model] = rest[i % len(rest)], (0, dashes)
    return styles


def _draw_line(axes: Axes, name: str, line: list[Row], colour: str, style: Any) -> None:
    ours = line[0].ours
    axes.plot(
        [_side(row) for row in line],
        [_rate(row) for row in line],
        label=name,
        color=colour,
        linestyle=style,
        linewidth=2.4 if ours else 1.6,
        marker=MARKERS[line[0].mode],
        markersize=6.5 if ours else 5.5,
        markeredgecolor="white",
        markeredgewidth=0.8,
        zorder=3 if ours else 2,
        clip_on=False,
    )


def _draw_bars(axes: Axes, series: Series) -> None:
    """One bar per series (and batch), the fastest on top; this library's in colour."""
    bars = [(key, row) for key, line in series.items() for row in line]
    bars.sort(key=lambda bar: -_rate(bar[1]))
    places = range(len(bars))
    colours = [COLOURS[0] if row.ours else "#b6bdc8" for _, row in bars]
    drawn = axes.barh(places, [_rate(row) for _, row in bars], height=0.68, color=colours)
    rates = axes.bar_label(drawn, [rate_text(_rate(row)) for _, row in bars], padding=4)
    axes.set_yticks(places, [", ".join(key) for key, _ in bars])
    axes.tick_params(length=0)
    for (_, row), texts in zip(bars, zip(rates, axes.get_yticklabels(), strict=True), strict=True):
        for text in texts:
            text.set(color=INK, fontsize=9, fontweight="bold" if row.ours else "normal")
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color("#9ca3af")


def _scale(axes: Axes, sides: dict[float, str]) -> None:
    """Logarithmic axes, with ticks at the measured sizes and at round rates."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(sides), list(sides.values()))
    spread = (max(sides) / min(sides)) ** 0.03
    axes.set_xlim(min(sides) / spread, max(sides) * spread)
    low, high = axes.get_ylim()
    if high / low < 30:  # a decade or less: marks between the powers of ten as well
        axes.yaxis.set_minor_formatter(FuncFormatter(_mark))
    axes.yaxis.set_major_formatter(FuncFormatter(_mark_all))
    axes.tick_params(which="both", colors=QUIET, labelsize=9, length=0)
    axes.grid(which="major", color="#e5e7eb", linewidth=0.9)
    axes.grid(which="minor", axis="y", color="#f3f4f6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9ca3af")
    axes.set_xlabel("image size (pixels)", color=INK, fontsize=10)


def _mark_all(value: float, _: int | None = None) -> str:
    return f"{value:,.10g}"


def _mark(value: float, _: int | None = None) -> str:
    """A label for 2 and 5 of every decade."""
    leading = round(value / 10 ** np.floor(np.log10(value)))
    return _mark_all(value) if leading in (2, 5) else ""


def _write_legend(axes: Axes, series: Series) -> None:
    """Names in the colours of their lines, beside the axes."""
    legend = axes.legend(
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=9,
        labelcolor="linecolor",
        handlelength=3,
        labelspacing=0.7,
    )
    for text, line in zip(legend.get_texts(), series.values(), strict=True):
        text.set_parse_math(False)  # names may hold a $
        text.set_fontweight("bold" if line[0].ours else "normal")


def _write_title(axes: Axes, device: str, rows: list[Row]) -> None:
    """What was measured, on what, and with which batches."""
    trained = {row.train for row in rows}
    subject = "Training step" if trained == {True} else "Inference"
    subject = "Throughput" if len(trained) > 1 else subject
    common = [values.pop() for name in ("dtype", "mode") if len(values := _values(rows, name)) == 1]
    lines: tuple[tuple[int, str, dict[str, Any]], ...] = (
        (42, f"{subject}, images per second", {"fontsize": 14, "fontweight": "bold", "color": INK}),
        (27, " · ".join([device, *common]), {"fontsize": 9.5, "color": QUIET}),
        (13, _batches(rows), {"fontsize": 9.5, "color": QUIET}),
    )
    for above, text, font in lines:
        axes.annotate(
            text, (0, 1), (0, above), xycoords="axes fraction", textcoords="offset points", **font
        )


def _values(rows: list[Row], name: str) -> set[str]:
    words = {
        "dtype": {row.dtype for row in rows},
        "mode": {_MODE_WORDS[row.mode] for row in rows},
    }
    return words[name]


_MODE_WORDS = {
    "eager": "eager",
    "compiled": "torch.compile",
    "graph": "CUDA graph",
    "compiled-graph": "torch.compile and CUDA graph",
}


def _batches(rows: list[Row]) -> str:
    """ "batch 128, 32, 8 at 224, 512, 1024 pixels"."""
    by_size: dict[tuple[float, str], set[int]] = {}
    for row in rows:
        by_size.setdefault((_side(row), size_name(row.size)), set()).add(row.batch)
    ordered = [("/".join(map(str, sorted(by_size[key]))), key[1]) for key in sorted(by_size)]
    batches = [batch for batch, _ in ordered]
    if len(set(batches)) == 1 and len(ordered) > 1:
        return f"batch {batches[0]}"
    return f"batch {', '.join(batches)} at {', '.join(size for _, size in ordered)} pixels"
