"""Speed and memory of image models, each checked for correctness before it is timed.

Needs torch, timm and numpy; `fastvim benchmark` is its command line.
"""

from fastvim.benchmark.cases import MODES, PRECISIONS, Case, Settings, check_names, parse_size
from fastvim.benchmark.measure import Bench
from fastvim.benchmark.plot import draw
from fastvim.benchmark.record import Record, Row, markdown

__all__ = [
    "MODES",
    "PRECISIONS",
    "Bench",
    "Case",
    "Record",
    "Row",
    "Settings",
    "check_names",
    "draw",
    "markdown",
    "parse_size",
]
