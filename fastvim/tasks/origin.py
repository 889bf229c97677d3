"""The weights that a run starts from, and the licence that goes on to its results."""

from __future__ import annotations

import logging

from fastvim.weights import Checkpoint
from fastvim.weights.names import is_published
from fastvim.weights.table import NON_COMMERCIAL, of_file

_logger = logging.getLogger(__name__)

ORIGIN = ("started_from", "licence")  # keys of the metadata


def origin_of(given: Checkpoint) -> dict[str, str]:
    """The published weights that a file goes back to, and their licence; empty without one."""
    told = given.metadata
    if entry := of_file(given.path.name):
        return {"started_from": entry.name, "licence": entry.licence}
    if "licence" not in told:
        if is_published(given.state):
            _logger.warning(
                "%s, under published names, does not tell its licence: that of FastVim's is %s",
                *(given.path, NON_COMMERCIAL),
            )
        return {}
    source = told.get("published") or told.get("started_from") or given.path
    return {"started_from": str(source), "licence": told["licence"]}
