"""Is an exported program right? It is run at sizes that it was not traced with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvim.errors import MachineError, one_line
from fastvim.export.programs import Program, Sizes

TOLERANCE = 1e-4  # of the largest value
SEED = 1

Run = Callable[[tuple[Tensor, ...]], Sequence[Tensor]]


@torch.no_grad()
def check(name: str, program: Program, run: Run, fixed: Sizes | None) -> float:
    """Compare a program with the model under this machine's own engines.

    Args:
        name: of the file, for the message.
        program: as it was traced.
        run: the exported program, from its inputs to its outputs.
        fixed: the only sizes that it takes; None for any.

    Returns:
        The largest difference, as a part of the largest value of that output.

    Raises:
        MachineError: it is larger than `TOLERANCE`, or not finite.
    """
    generator = torch.Generator().manual_seed(SEED)
    worst = 0.0
    for number, sizes in enumerate([fixed] if fixed else program.others(), 1):
        inputs = program.make(sizes, generator, 0 if fixed else number)
        wanted = outputs(program.module, inputs)
        try:
            found = run(inputs)
        except Exception as error:  # of torch's guards or onnxruntime
            raise MachineError(
                f"{name} is not written: it fails for images {tuple(inputs[0].shape)}: "
                f"{one_line(error)}"
            ) from error
        for output, want, got in zip(program.outputs, wanted, found, strict=True):
            same = want.shape == got.shape
            difference = (got - want).abs().max() / want.abs().max() if same else torch.inf
            if not difference <= TOLERANCE:  # not a number is no small one
                raise MachineError(
                    f"{name} is not written: for images {tuple(inputs[0].shape)} its {output} "
                    f"differs from the model's by {float(difference):.1e} of the largest value, at "
                    f"most {TOLERANCE:.0e} was expected"
                )
            worst = max(worst, float(difference))
    return worst


def outputs(module: Callable[..., Any], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a module or a program gives, as a tuple."""
    found = module(*inputs)
    return (found,) if isinstance(found, Tensor) else tuple(found)
