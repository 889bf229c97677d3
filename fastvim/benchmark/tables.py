"""Tables of results: columns of text, and Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from fastvim.benchmark.cases import Case, size_name
from fastvim.benchmark.record import OUT_OF_MEMORY, Row

SERIES = ("mode", "dtype", "train", "channels_last")  # what may tell two series of a model apart


def subject(rows: list[Row]) -> str:
    """What was measured, in a few words."""
    words = {f"{row.dtype}, {'training step' if row.train else 'inference'}" for row in rows}
    return "; ".join(sorted(words))


def columns(rows: list[Row]) -> dict[str, list[str]]:
    """A table of the rows, by its columns. Those without a value are left out."""
    every = {
        "model": [row.model for row in rows],
        "image": [size_name(row.size) for row in rows],
        "batch": [str(row.batch) for row in rows],
        "mode": [row.mode for row in rows],
        "images/s": [rate(row) for row in rows],
        "ms": [_number(row.latency_ms, ",.2f") for row in rows],
        "GiB": [_number(row.memory_gib, ".2f") for row in rows],
        "loop images/s": [_loop_rate(row) for row in rows],
        "loop GiB": [_number(row.loop_memory_gib, ".2f") for row in rows],
        "error": [_number(row.error, ".0e") for row in rows],
        "share of roofline": [_number(row.share_of_roofline, ".0%") for row in rows],
    }
    return {name: cells for name, cells in every.items() if any(cells)}


def markdown(rows: Iterable[Row]) -> str:
    """Images per second as a Markdown table: models down, sizes (batches) across.

    A series with figures of the training loop has a second line for them.
    """
    rows = list(rows)
    columns = sorted({(row.size, row.batch) for row in rows}, key=lambda c: (c[0][0] * c[0][1], c))
    heads = [f"{size_name(size)} ({batch})" for size, batch in columns]
    lines = [
        f"| images/s | {' | '.join(heads)} |",
        f"|---|{'---:|' * len(heads)}",
    ]
    for key, series in labels(rows).items():
        cells = {(row.size, row.batch): rate(row) for row in series}
        loops = {(row.size, row.batch): text for row in series if (text := _loop_rate(row))}
        for name, values in ((key, cells), ((*key, "training loop"), loops)):
            if values:
                entries = [values.get(column, "-") for column in columns]
                lines.append(f"| {', '.join(name)} | {' | '.join(entries)} |")
    return "\n".join(lines) + "\n"


def describe(case: Case | Row) -> str:
    """A case in a few words."""
    return f"{case.model} {size_name(case.size)} ({case.batch}) {case.mode}"


def rate(row: Row) -> str:
    """Images per second of a row, or that it failed."""
    if row.images_per_second is not None and row.failure is None:
        return rate_text(row.images_per_second)
    return OUT_OF_MEMORY if row.failure == OUT_OF_MEMORY else "failed"


def _loop_rate(row: Row) -> str:
    if row.loop_images_per_second is None or row.failure is not None:
        return ""
    return rate_text(row.loop_images_per_second)


def rate_text(rate: float) -> str:
    """Images per second with three digits or more."""
    digits = 0 if rate >= 100 else 1 if rate >= 10 else 2
    return f"{rate:,.{digits}f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def labels(rows: Iterable[Row], batches: bool = False) -> dict[tuple[str, ...], list[Row]]:
    """Rows by series. A series' name leaves out what is the same in every row.

    Args:
        rows: of any number of series.
        batches: whether two batches at one size make two series.

    Returns:
        From the name (model, what else distinguishes the series, …) to the series' rows, smallest
        image first.
    """
    rows = list(rows)
    varying = [name for name in SERIES if len({_word(row, name) for row in rows}) > 1]
    without_batch = [(row.key[:2] + row.key[3:]) for row in rows]
    if batches and len(set(without_batch)) < len(rows):
        varying.append("batch")
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (row.model, *(word for name in varying if (word := _word(row, name))))
        found.setdefault(key, []).append(row)
    return {key: sorted(rows, key=lambda r: r.size[0] * r.size[1]) for key, rows in found.items()}


def _word(row: Row, name: str) -> str:
    """An attribute of a row, as a word of a series' name."""
    words = {
        "batch": f"batch {row.batch}",
        "mode": row.mode,
        "dtype": row.dtype,
        "train": "training" if row.train else "inference",
        "channels_last": "channels last" if row.channels_last else "",
    }
    return words[name]
