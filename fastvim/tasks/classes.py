"""The classes of weights against those of the data, by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from fastvim.errors import UserError, first_few
from fastvim.weights import Checkpoint, known_classes, same_classes, take_classes

_logger = logging.getLogger(__name__)


class NamedOutputs(Protocol):
    """A task whose outputs have the names of the data's classes.

    Attributes:
        classes_by_name: each row of a layer of classes is of one class.
        fitting: whether this is training.
    """

    classes_by_name: bool

    @property
    def fitting(self) -> bool: ...

    def output_names(self) -> list[str]: ...


def require_classes(task: NamedOutputs, told: Mapping[str, Any], source: str) -> None:
    """Compare the classes of weights with those of a task's data.

    Args:
        task: whose outputs are named.
        told: metadata of the weights.
        source: of the weights, for messages.

    Raises:
        UserError: other classes, or another order; says both lists.
    """
    known, _ = known_classes(told)
    if known and not same_classes(own := task.output_names(), known):
        raise UserError(_other_classes(source, known, own))


def fit_classes(task: NamedOutputs, given: Checkpoint) -> Checkpoint:
    """Weights to start from, whose layers of classes are of the classes of a task's data.

    In training the layers are taken by name where the weights know all of the classes, and left out
    where they do not.

    Raises:
        UserError: not in training, and as `require_classes`.
    """
    if not task.fitting:
        require_classes(task, given.metadata, str(given.path))
    known, _ = known_classes(given.metadata)
    if not known or same_classes(own := task.output_names(), known):
        return given
    rows = None
    if task.classes_by_name and len({*known}) == len(known) and {*own} <= {*known}:
        rows = [known.index(name) for name in own]
    _logger.warning(
        "%s; the layers of classes %s",
        _other_classes(str(given.path), known, own),
        "start anew" if rows is None else "are taken by name",
    )
    return replace(given, state=take_classes(given.state, rows))


def _other_classes(source: str, known: list[str], own: list[str]) -> str:
    return (
        f"{source} is of other classes: {first_few(known, 20)}; the data have {first_few(own, 20)}"
    )
