"""Checks of correctness, made before anything is timed.

This library's models are compared with the reference operations in float32 on the same weights.
Every model's compiled or captured form is compared with its eager form, on images that it has not
seen before.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from fastvim.benchmark.cases import Precision, Settings, Size, channels_of, random_images
from fastvim.benchmark.training import TrainingLoop, TrainingStep, gradients
from fastvim.inference import Predictor
from fastvim.layers.embed import ChannelPatchEmbed, PatchEmbed
from fastvim.ops import use_engine

# The reference takes a step per token for Vim, and in training keeps the state of each. So the
# comparison uses a small batch of square images, of at most this number of tokens.
IMAGES = 2
MOST_TOKENS = {False: 1024, True: 196}
PART = 16  # images at a time in the eager run that a captured run is compared with
_EXACT = Precision(torch.float32, None, 0.0)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖; infinite if either is not finite, or if 0 is expected.

    A comparison with an expected 0 proves nothing.
    """
    actual, expected = actual.float(), expected.float()
    scale = float(torch.linalg.vector_norm(expected))
    error = float(torch.linalg.vector_norm(actual - expected))
    return error / scale if math.isfinite(error) and 0 < scale < math.inf else math.inf


def checked_size(model: nn.Module, size: Size, train: bool) -> Size:
    """The image size at which a model's engines are compared with the reference."""
    patches = model.patch_embed
    assert isinstance(patches, PatchEmbed)
    tokens = patches.known_chans if isinstance(patches, ChannelPatchEmbed) else 1  # of a cell
    most = math.isqrt(MOST_TOKENS[train] // tokens) * patches.stride
    return min(size[0], most), min(size[1], most)


def engine_error(model: nn.Module, size: Size, settings: Settings) -> float:
    """Relative error of a model's engines against the reference in float32.

    Args:
        model: one of this library's, on the device and in the dtype of the run.
        size: of the images, from `checked_size`.
        settings: with `train`, logits and gradients are compared; else the logits.
    """
    shape = (IMAGES, channels_of(model), *checked_size(model, size, settings.train))
    images = random_images(shape, settings)
    exact = copy.deepcopy(model).float()
    if settings.train:
        step = TrainingStep(model.eval(), images, settings.precision)
        step.renew()
        logits, gradient = step.results()
        with use_engine("reference"):
            defined = TrainingStep(exact.eval(), images.float(), _EXACT, classes=step.classes)
            expected, slope = defined.results()
        model.zero_grad(set_to_none=True)
        return max(relative_error(logits, expected), relative_error(gradient, slope))
    actual = predictor(model, tuple(images.shape), "eager", settings)(images)
    with use_engine("reference"), torch.inference_mode():
        return relative_error(actual, exact.eval()(images.float()))


def predictor(model: nn.Module, shape: tuple[int, ...], mode: str, settings: Settings) -> Predictor:
    """The predictor of a mode. It takes the model itself, not a copy."""
    return Predictor(
        model,
        shape,
        dtype=settings.precision.weights,
        device=settings.device,
        autocast=settings.precision.autocast,
        compile="compiled" in mode,
        capture="graph" in mode,
        memory_format=settings.memory_format,
        copy_model=False,
    )


def mode_error(served: Predictor, settings: Settings) -> float:
    """Largest relative error of a mode on fresh images, against the eager model on few at a time.

    A graph that misses a part of the computation, or reads a freed tensor, still gives the right
    results for the images it was captured on. In eager mode this finds results that are not finite,
    and kernels that fail for large batches.
    """
    fresh = random_images(served.images.shape, settings)
    parts = fresh.split(PART)
    eager = predictor(served.model, tuple(parts[0].shape), "eager", settings)
    pairs = zip(served(fresh).split(PART), parts, strict=True)
    return max(relative_error(actual, eager(part)) for actual, part in pairs)


def step_error(step: TrainingStep, settings: Settings) -> float:
    """Relative error of a step's logits and gradients on fresh images and classes, in eval mode.

    In eval mode, since dropout draws other numbers when it is compiled. A captured step is recorded
    in that mode for the check, and again in the model's own mode by the next call. Its memory is
    freed before the eager step, which needs as much.
    """
    was_training = step.model.training
    step.model.eval()
    step.release()
    step.renew()
    logits, gradient = step.results()
    step.release()
    eager = TrainingStep(step.model, step.images, settings.precision, classes=step.classes)
    expected, slope = eager.results()
    step.model.train(was_training)
    return max(relative_error(logits, expected), relative_error(gradient, slope))


def loop_error(loop: TrainingLoop, settings: Settings) -> float:
    """Relative error of a loop's gradients on fresh images, against an eager step.

    In train mode: a captured model draws the same random numbers as an eager one.
    """
    loop.differentiate()  # records, if captured
    loop.images.normal_()
    torch.manual_seed(0)
    loop.differentiate()
    actual = gradients(loop.model)
    eager = TrainingStep(loop.model, loop.images, settings.precision, classes=loop.classes)
    torch.manual_seed(0)
    return relative_error(actual, eager.results()[1])
