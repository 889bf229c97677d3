"""The weights that a command works with: `--model NAME_OR_FILE`, and what goes with it."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from fastvim_cli.arguments import UsageError

if TYPE_CHECKING:
    from torch import nn


def add_model(parser: argparse.ArgumentParser, default: str, *, checkpoint: bool = False) -> None:
    """The options of the model, for `load`.

    Args:
        parser: of the command.
        default: name of the published weights that are taken if none are named.
        checkpoint: add `--checkpoint` as well.
    """
    add = parser.add_argument
    help = f"published weights (fastvim models --pretrained), or a file (default: {default})"
    add("--model", action=_Once, metavar="NAME_OR_FILE", help=help)
    if checkpoint:
        help = "as --model FILE; beside --model NAME: the weights that go into that model"
        add("--checkpoint", action=_Once, metavar="FILE", help=help)
    add_options(parser)
    parser.set_defaults(default_model=default)


class _Once(argparse.Action):
    """Stores a value that may be given once, and is not empty."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest)
        if before is not None:
            parser.error(f"{option_string} {before} and {option_string} {values}: expected one")
        if not values:
            parser.error(f"{option_string} '': expected a name or a file")
        setattr(namespace, self.dest, values)


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--model-arg`, `--ema` and `--raw`, for `load_named`."""
    add = parser.add_argument
    option: dict[str, Any] = {"action": "append", "default": [], "dest": "model_args"}
    help = "an option that no file tells, such as pool_scale=0.25 (JSON); may be repeated"
    add("--model-arg", metavar="NAME=VALUE", type=_model_arg, help=help, **option)
    copies = parser.add_mutually_exclusive_group()
    help = "take averaged weights where there are both (default: those of the published number)"
    copies.add_argument("--ema", action="store_true", default=None, help=help)
    help = "take the weights that are not averaged, where there are both"
    copies.add_argument("--raw", action="store_false", dest="ema", help=help)


def _model_arg(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()) or name in ("name", "path", "ema"):
        raise argparse.ArgumentTypeError(f"{text}: expected OPTION=VALUE of a model")
    if value in ("True", "False", "None"):
        raise argparse.ArgumentTypeError(f"{text}: expected true, false or null")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def first_word_as_model(arguments: argparse.Namespace) -> None:
    """Take a first image that is called as a file of weights for `--model`.

    Raises:
        UsageError: there is a `--model` too, or nothing but the weights.
    """
    from fastvim.weights.files import PICKLED

    first, *images = arguments.images
    if not first.endswith((".safetensors", *PICKLED)):
        return
    if arguments.model is not None:
        raise UsageError(f"{first} and --model {arguments.model}: expected one model")
    if not images:
        raise UsageError(f"{first}: expected IMAGES after the weights")
    arguments.model, arguments.images = first, images


def load(
    arguments: argparse.Namespace, command: str, *required: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that the options of `add_model` name, and the metadata of its weights.

    The other arguments are those of `load_named`.
    """
    from fastvim.weights import is_file_name

    model, file = arguments.model, getattr(arguments, "checkpoint", None)
    if file is None:
        return load_named(model or arguments.default_model, arguments, command, *required)
    if model is not None and is_file_name(model):
        raise UsageError(f"--model {model} and --checkpoint {file}: expected one file of weights")
    return load_named(model, arguments, command, *required, file=file)


def load_named(
    name: str | None,
    arguments: argparse.Namespace,
    command: str,
    *required: str,
    file: str | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """A model, and the metadata of its weights.

    Args:
        name: of published weights or of a model, or a file of weights.
        arguments: with those of `add_options`.
        command: that the model is for.
        required: keys of the metadata.
        file: weights for a model of that name; without a name the file says which.

    Raises:
        UserError: weights of a model for another command, or without what is required.
    """
    from fastvim.errors import UserError
    from fastvim.weights import is_file_name, load_model

    if name is not None and is_file_name(name):
        name, file = None, name
    options = dict(arguments.model_args)
    try:
        model, metadata = load_model(name, file, ema=arguments.ema, **options)
    except TypeError as error:
        if not options:
            raise
        given = " ".join(f"{name}={json.dumps(value)}" for name, value in options.items())
        raise UserError(f"--model-arg {given}: a value of another type ({error})") from error
    source = file or name
    kind, commands = _kind(model)
    if command not in commands:
        raise UserError(f"{source} is {kind}: see fastvim {commands[0]}")
    if missing := [key for key in required if key not in metadata]:
        raise UserError(f"{source} does not say {missing[0]}: expected weights of fastvim fit")
    return model, metadata


def _kind(model: nn.Module) -> tuple[str, tuple[str, ...]]:
    """What a model is, and the commands that use it."""
    from fastvim.models import (
        CascadeMaskRCNN,
        FastChannelVim,
        FeatureMaps,
        MaskedAutoencoder,
        UPerNet,
    )

    if isinstance(model, MaskedAutoencoder):
        return "a masked autoencoder", ("reconstruct",)
    if isinstance(model, UPerNet):
        return "a segmentor", ("segment",)
    if isinstance(model, CascadeMaskRCNN):
        return "a detector", ("detect",)
    if isinstance(model, FeatureMaps) or getattr(model, "num_classes", 0) < 1:
        return "a backbone without a head", ("fit",)
    if isinstance(model, FastChannelVim):
        return "a channel model", ("predict", "channels")
    return "a classifier", ("predict",)
