"""The weights that a command works with: `--model NAME_OR_FILE`, and what goes with it."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from fastvim_cli.arguments import UsageError

if TYPE_CHECKING:
    from fastvim.inference.models import ModelChoice


def add_model(parser: argparse.ArgumentParser, default: str, *, checkpoint: bool = False) -> None:
    """The options of the model, for `chosen_model`.

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
    """`--model-arg`, `--ema` and `--raw`, for `model_choice`."""
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

    first, *images = arguments.images or [""]
    if not first.endswith((".safetensors", ".onnx", *PICKLED)):
        return
    if arguments.model is not None:
        raise UsageError(f"{first} and --model {arguments.model}: expected one model")
    if not images and not arguments.list:
        raise UsageError(f"{first}: expected IMAGES after the weights")
    arguments.model, arguments.images = first, images


def chosen_model(arguments: argparse.Namespace) -> ModelChoice:
    """The choice that the options of `add_model` make."""
    from fastvim.weights import is_file_name

    name, file = arguments.model, getattr(arguments, "checkpoint", None)
    if file is not None and name is not None and is_file_name(name):
        raise UsageError(f"--model {name} and --checkpoint {file}: expected one file of weights")
    return model_choice(name or (None if file else arguments.default_model), arguments, file)


def model_choice(
    name: str | None, arguments: argparse.Namespace, file: str | None = None
) -> ModelChoice:
    """A name or a file, with the options of `add_options`."""
    from fastvim.inference.models import ModelChoice

    return ModelChoice(name, file, arguments.ema, dict(arguments.model_args))
