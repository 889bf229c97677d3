"""Is it right? Asked before how fast it is.

This library's models are compared with their definitions in float32 on the same weights; every
model's compiled or captured form with its eager one, on images that it has not seen before.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from fastvim.benchmark.cases import Precision, Settings, Size, channels_of, random_images
from fastvim.benchmark.training import TrainingStep
from fastvim.inference import Predictor
from fastvim.layers.embed import ChannelPatchEmbed, PatchEmbed
from fastvim.ops import use_engine

# The definitions take a step per token for Vim, and in training keep the state of each: the
# comparison with them is made on a small batch of square images of at most so many tokens.
IMAGES = 2
MOST_TOKENS = {False: 1024, True: 196}
PART = 16  # images at a time in the eager run beside a captured one
_EXACT = Precision(torch.float32, None, 0.0)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖; infinite where either is not finite, or 0 is expected.

    An expected 0 would prove nothing, whatever came out.
    """
    actual, expected = actual.float(), expected.float()
    scale = float(torch.linalg.vector_norm(expected))
    error = float(torch.linalg.vector_norm(actual - expected))
    return error / scale if math.isfinite(error) and 0 < scale < math.inf else math.inf


def checked_size(model: nn.Module, size: Size, train: bool) -> Size:
    """The size of image at which the engines of a model are compared with the definitions."""
    patches = model.patch_embed
    assert isinstance(patches, PatchEmbed)
    tokens = patches.known_chans if isinstance(patches, ChannelPatchEmbed) else 1  # of a cell
    most = math.isqrt(MOST_TOKENS[train] // tokens) * patches.stride
    return min(size[0], most), min(size[1], most)


def engine_error(model: nn.Module, size: Size, settings: Settings) -> float:
    """Relative error of what serves `model` against the definitions in float32.

    Args:
        model: one of this library's, on the device and in the dtype of the run.
        size: of the images, cut to what the definitions can take.
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
    """What runs the inference of a mode; takes the model itself."""
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
    """Largest relative error of a mode on fresh images against the eager model on few at a time.

    A graph that missed a part of the computation, or reads a tensor that was freed, still gives the
    right results for the images it was captured on. For the eager mode this finds what is not
    finite, and kernels that a large batch misleads.
    """
    fresh = random_images(served.images.shape, settings)
    parts = fresh.split(PART)
    eager = predictor(served.model, tuple(parts[0].shape), "eager", settings)
    pairs = zip(served(fresh).split(PART), parts, strict=True)
    return max(relative_error(actual, eager(part)) for actual, part in pairs)


def step_error(step: TrainingStep, settings: Settings) -> float:
    """The same of a training step: logits and gradients on fresh images and classes, in eval mode.

    In eval mode, since dropout draws other numbers when it is compiled. A captured step is recorded
    in that mode for the check, and once more in the model's own mode by the call that follows. Its
    memory is given up before the eager step needs as much.
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
