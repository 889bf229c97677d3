"""Speed and memory of image models, each checked for correctness before it is timed.

Needs torch, timm and numpy; pictures need matplotlib. `fastvim benchmark` is its command line.
"""

from fastvim.benchmark.cases import MODES, PRECISIONS, Case, Settings, check_names, parse_size
from fastvim.benchmark.measure import Bench
from fastvim.benchmark.plot import draw
from fastvim.benchmark.record import Record, Row
from fastvim.benchmark.run import Run
from fastvim.benchmark.tables import columns, describe, markdown, rate, subject

__all__ = [
    "MODES",
    "PRECISIONS",
    "Bench",
    "Case",
    "Record",
    "Row",
    "Run",
    "Settings",
    "check_names",
    "columns",
    "describe",
    "draw",
    "markdown",
    "parse_size",
    "rate",
    "subject",
]
