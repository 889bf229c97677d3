"""Read torch's files, plain values alone: nothing in them is executed.

What training scripts and tools leave beside the weights is read as an inert stand-in: it takes any
arguments, keeps nothing and does nothing. What it replaces is neither imported nor called.
"""

from __future__ import annotations

import argparse
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fastvim.errors import UserError
from fastvim.storage import require_file
from fastvim.weights.archive import check_archive, is_archive

# What unpickling damaged bytes has been seen to raise.
_DAMAGE = (
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
)


class _Inert:
    """Stands in for an object that lies beside the weights and is not used.

    A subclass for each name says what it replaces.
    """

    replaces: str

    def __new__(cls, *args: Any, **options: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __repr__(self) -> str:
        return self.replaces


class _Attribute(_Inert):
    """Stands in for what `getattr` would return; mmengine's records name their statistics by it."""

    replaces = "builtins.getattr"

    def __init__(self, owner: Any = None, name: Any = "", *rest: Any) -> None:
        # Of the instance alone: the class stands for `getattr` itself.
        self.replaces = f"{getattr(owner, 'replaces', type(owner).__name__)}.{name}"


class _Mapping:
    """Stands in for a kind of dict: a plain one, which torch's reader can fill."""

    def __new__(cls, *args: Any) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


class _Sequence:
    """Stands in for a kind of list: a plain one, which torch's reader can fill."""

    def __new__(cls, *args: Any) -> list[Any]:  # type: ignore[misc]
        return []


_SCALARS = (
    *("bool", "bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "longdouble", "complex64", "complex128", "str_", "bytes_"),
)
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_OMEGACONF = (
    *("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata"),
    *(f"nodes.{kind}Node" for kind in ("Any", "Boolean", "Bytes", "Float", "Integer", "String")),
    *("nodes.EnumNode", "nodes.PathNode"),
)
_INERT = (
    *(f"builtins.{kind}" for kind in ("bool", "bytes", "dict", "float", "int", "list", "object")),
    *(f"builtins.{kind}" for kind in ("str", "tuple", "frozenset", "range", "slice")),
    *("mmengine.logging.history_buffer.HistoryBuffer", "mmengine.config.config.Config"),
    *("numpy.dtype", "numpy.ndarray", *(f"numpy.{kind}" for kind in _SCALARS)),
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *(f"datetime.{kind}" for kind in ("date", "datetime", "time", "timedelta", "timezone")),
    *("decimal.Decimal", "fractions.Fraction", "uuid.UUID", "types.SimpleNamespace", "typing.Any"),
    "torch.torch_version.TorchVersion",
    *(f"omegaconf.{name}" for name in _OMEGACONF),
)
_MAPPINGS = (
    "collections.defaultdict",
    "mmengine.config.config.ConfigDict",
    "addict.addict.Dict",
    *(
        f"{package}.utilities.data.AttributeDict"
        for package in ("lightning_fabric", "pytorch_lightning", "lightning.fabric")
    ),
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
_STAND_INS: list[Any] = [
    argparse.Namespace,  # the original Vim's arguments, which tell the size of its images
    (_Attribute, _Attribute.replaces),
    *((type("_Inert", (_Inert,), {"replaces": name}), name) for name in _INERT),
    *((_Mapping, name) for name in _MAPPINGS),
    (_Sequence, "collections.deque"),
]


def read_pickled(path: Path, mmap: bool = False) -> dict[str, Any]:
    """What a file of `torch.save` holds, in its zip format or the one before it.

    Args:
        path: the file.
        mmap: read tensors when they are used; the zip format alone can.

    Raises:
        UserError: a damaged file, one of more than plain values (names what), or one of no dict.
    """
    require_file(path)
    content = load_pickled(path, _STAND_INS, mmap=mmap and zipfile.is_zipfile(path))
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}: expected a state dict")
    return content


def load_pickled(path: Path, stand_ins: Sequence[Any] = (), **options: Any) -> Any:
    """`torch.load` of plain values; of an archive everything is compared with its checksums.

    Args:
        path: the file.
        stand_ins: for what else it may hold, as `torch.serialization.safe_globals` takes them.
        **options: of `torch.load`.

    Raises:
        UserError: a file that is damaged, or refused since it holds more than plain values.
    """
    try:
        if is_archive(path):
            check_archive(path)
        with torch.serialization.safe_globals(list(stand_ins)), warnings.catch_warnings():
            # A file that is read nevertheless.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, **{"map_location": "cpu", **options}, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} {_refusal(str(error), path)}") from error
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(f"{path} {_damage(error, path)}") from error


def _refusal(message: str, path: Path) -> str:
    """Why a file is not read, without torch's colours and its advice to execute the file."""
    message = re.sub(r"\x1b\[[0-9;]*m", "", message)
    if found := re.search(r"GLOBAL (\S+) (?:was not|whose module)", message):
        name = found[1] if "." in found[1] else f"builtins.{found[1]}"
        return f"holds {name}: not a plain value, and nothing in a file is executed"
    if found := re.search(r"unrecognized function (\S+)", message):
        return f"wants to call {found[1]}: nothing in a file is executed"
    if "Unsupported operand" in message and (name := _first_global(path)):
        return f"holds {name}, pickled otherwise than by torch: nothing in a file is executed"
    if what := no_weights(path):
        return what
    if "Unsupported operand" in message:
        return "is damaged or no checkpoint: its bytes are not those that torch writes"
    found = re.search(r"WeightsUnpickler error:\s*(.+)", message)
    reason = found[1] if found else message.strip()
    reason = reason.splitlines()[0].partition(". ")[0].rstrip(".")
    return f"is damaged, or holds more than plain values: {reason}"


def _first_global(path: Path) -> str:
    """The first class or function that a pickle of a later protocol names; "" for none."""
    strings: list[str] = []
    with suppress(*_DAMAGE), path.open("rb") as file:  # what is no pickle names nothing
        for opcode, value, _ in pickletools.genops(file):
            if opcode.name == "STACK_GLOBAL":
                return ".".join(strings[-2:])
            if isinstance(value, str):
                strings.append(value)
    return ""


def _damage(error: BaseException, path: Path) -> str:
    """What is wrong with a file that torch cannot read, in words."""
    if isinstance(error, PermissionError):
        return f"cannot be read: {error.strerror}"
    if what := no_weights(path):
        return what
    reason = "its content ends early, or torch did not write it"
    if isinstance(error, RuntimeError):  # what else is raised tells of the reader's own state
        words = re.sub(r"^\[enforce fail at [^]]*\][ .]*", "", first_line(error))
        reason = words.partition(". ")[0]
    return f"is damaged or no checkpoint: {reason}"


_BEGINNINGS = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself: git lfs pull"),
    (b"<", "is a web page, not weights"),
    (b"\x89PNG", "is an image, not weights"),
    (b"\xff\xd8\xff", "is an image, not weights"),
    (b"\x89HDF", "is an HDF5 file: expected one of torch or safetensors"),
    (b"\x1f\x8b", "is packed by gzip: unpack it first"),
)


def no_weights(path: Path) -> str:
    """What a file is that holds no weights, as far as its first bytes tell; "" if they do not."""
    with path.open("rb") as file:
        start = file.read(1024)
    if not start:
        return "is damaged: it is empty"
    for beginning, what in _BEGINNINGS:
        if start.lstrip().startswith(beginning):
            return what
    if not any(start):
        return "is damaged: it begins with zeros"
    if start.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        return "is damaged: it ends before its content does"
    if start[8:9] == b"{" and path.suffix != ".safetensors":
        return "is a file of safetensors: expected a name in .safetensors"
    with suppress(UnicodeDecodeError):
        if start.decode().replace("\n", " ").replace("\r", " ").replace("\t", " ").isprintable():
            return "is a text file, not weights"
    return ""


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
