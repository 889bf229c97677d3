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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Key = tuple[str, ...]  # of a series: its model, and what else tells it from the others
Series = dict[Key, list[Row]]

# Okabe and Ito's colours, told apart by colour-blind eyes as well; their yellow is too pale here.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = {"eager": "o", "compiled": "s", "graph": "^", "compiled-graph": "D"}
DASHES = ((4.0, 2.0), (1.2, 1.4))
INK, QUIET = "#1f2937", "#6b7280"
LABEL_POINTS = 13  # height of a line's label, with the space to the next
POINTS = 72  # of an inch
# Inches: margins, and the axes.
LEFT, TOP, BOTTOM, LEAD, WIDTH, HEIGHT = 0.75, 0.95, 0.55, 0.32, 5.6, 3.6


def draw(record: Record, path: Path) -> None:
    """Write the picture of a record's rows; the format follows from the name (needs matplotlib).

    Raises:
        UserError: no row has a time.
    """
    figure = draw_rates(record.device, record.rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white")


def draw_rates(device: str, rows: Iterable[Row]) -> Figure:
    """One line per model (and mode, where there are several): this library's solid, others dashed.

    Where all images have one size, bars instead.

    Raises:
        UserError: no row has a time.
    """
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.failure is None and row.images_per_second is not None]
    if not timed:
        raise UserError("nothing to draw: no row has a time")
    series = _by_speed(labels(timed, batches=True))
    sides = {_side(row): size_name(row.size) for row in timed}
    figure = Figure()
    names = _text_inches(figure, series)
    if len(sides) > 1:
        height = max(HEIGHT, len(series) * LABEL_POINTS / POINTS)
        axes = _axes(figure, LEFT, height, LEAD + names, BOTTOM)
        styles = _styles(series)
        for key, line in series.items():
            _draw_line(axes, line, *styles[key[0]])
        _scale(axes, sides)
        _write_labels(axes, series, styles)
    else:
        axes = _axes(figure, names + 0.3, 0.3 * sum(map(len, series.values())), 0.7, 0.1)
        _draw_bars(axes, series)
    _write_title(figure, device, timed)
    return figure


def _text_inches(figure: Figure, series: Series) -> float:
    """Width of the longest name."""
    widths = []
    for key in series:
        text = figure.text(0, 0, ", ".join(key), fontsize=9, fontweight="bold")
        widths.append(text.get_window_extent().width / figure.dpi)
        text.remove()
    return max(widths)


def _axes(figure: Figure, left: float, height: float, right: float, bottom: float) -> Axes:
    """Axes `height` inches high, with the margins that the names need."""
    total, tall = left + WIDTH + right + 0.1, TOP + height + bottom
    figure.set_size_inches(total, tall)
    return figure.add_axes((left / total, bottom / tall, WIDTH / total, height / tall))


def _side(row: Row) -> float:
    """Side of the square of as many pixels."""
    return float(np.sqrt(row.size[0] * row.size[1]))


def _rate(row: Row) -> float:
    assert row.images_per_second is not None
    return row.images_per_second


def _by_speed(series: Series) -> Series:
    """Fastest at the largest size first, as the labels stand."""
    order = sorted(series, key=lambda key: -_rate(series[key][-1]))
    return {key: series[key] for key in order}


def _styles(series: Series) -> dict[str, tuple[str, Any]]:
    """Colour and line style of each model; others do not take the colours of ours."""
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


def _draw_line(axes: Axes, line: list[Row], colour: str, style: Any) -> None:
    ours = line[0].ours
    axes.plot(
        [_side(row) for row in line],
        [_rate(row) for row in line],
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
    for place, (key, row) in enumerate(bars):
        axes.barh(place, _rate(row), height=0.68, color=COLOURS[0] if row.ours else "#b6bdc8")
        ink: dict[str, Any] = {"color": INK, "fontsize": 9, "verticalalignment": "center"}
        ink["fontweight"] = "bold" if row.ours else "normal"
        axes.annotate(
            rate_text(_rate(row)), (_rate(row), place), (4, 0), textcoords="offset points",
            **ink,
        )  # fmt: skip
        axes.annotate(
            ", ".join(key), (0, place), (-6, 0), textcoords="offset points",
            horizontalalignment="right", **ink,
        )  # fmt: skip
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color("#9ca3af")


def _scale(axes: Axes, sides: dict[float, str]) -> None:
    """Logarithmic axes whose marks are the sizes measured, and round rates."""
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
    """2 and 5 of every decade."""
    leading = round(value / 10 ** np.floor(np.log10(value)))
    return _mark_all(value) if leading in (2, 5) else ""


def _write_labels(axes: Axes, series: Series, styles: dict[str, tuple[str, Any]]) -> None:
    """A name beside the end of each line, moved apart where they would touch."""
    figure = axes.figure
    ends = [
        axes.transData.transform((_side(line[-1]), _rate(line[-1]))) for line in series.values()
    ]
    pixels = figure.dpi / POINTS
    right = axes.transAxes.transform((1, 0))[0]
    heights = spread_out([end[1] for end in ends], LABEL_POINTS * pixels)
    to_axes = axes.transAxes.inverted()
    for (key, line), end, height in zip(series.items(), ends, heights, strict=True):
        colour = styles[key[0]][0]
        x, y = to_axes.transform((right + 22 * pixels, height))
        # A thin line leads from the last point to a name that had to move.
        start = to_axes.transform((end[0] + 5 * pixels, end[1]))
        bend, stop = (right + 10 * pixels, right + 19 * pixels)
        (bend_x, _), (stop_x, _) = to_axes.transform([(bend, 0), (stop, 0)])
        axes.plot(
            [start[0], max(bend_x, start[0]), stop_x],
            [start[1], start[1], y],
            transform=axes.transAxes,
            color=colour,
            linewidth=0.8,
            alpha=0.6,
            clip_on=False,
        )
        axes.text(
            x,
            y,
            ", ".join(key),
            transform=axes.transAxes,
            color=colour,
            fontsize=9,
            fontweight="bold" if line[0].ours else "normal",
            verticalalignment="center",
        )


def spread_out(wanted: list[float], gap: float) -> list[float]:
    """Positions in falling order, at least `gap` apart and near to the wanted ones.

    Neighbours that would touch become a group, centred on what its members wanted.
    """
    groups: list[list[float]] = []
    for value in wanted:
        groups.append([value])
        while len(groups) > 1 and _edges(groups[-2], gap)[1] - _edges(groups[-1], gap)[0] < gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_edges(group, gap)[0] - i * gap for group in groups for i in range(len(group))]


def _edges(group: list[float], gap: float) -> tuple[float, float]:
    """Highest and lowest position of a group centred on its mean."""
    middle, half = sum(group) / len(group), (len(group) - 1) * gap / 2
    return middle + half, middle - half


def _write_title(figure: Figure, device: str, rows: list[Row]) -> None:
    """What was measured, on what, and with which batches."""
    trained = {row.train for row in rows}
    subject = "Training step" if trained == {True} else "Inference"
    subject = "Throughput" if len(trained) > 1 else subject
    common = [values.pop() for name in ("dtype", "mode") if len(values := _values(rows, name)) == 1]
    width, height = figure.get_size_inches()
    lines = (
        (0.25, f"{subject}, images per second", {"fontsize": 14, "fontweight": "bold"}, INK),
        (0.52, " · ".join([device, *common]), {"fontsize": 9.5}, QUIET),
        (0.72, _batches(rows), {"fontsize": 9.5}, QUIET),
    )
    for below, text, font, colour in lines:
        place = 0.16 / width, 1 - below / height
        figure.text(*place, text, color=colour, verticalalignment="center", **font)


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
