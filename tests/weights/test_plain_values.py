"""What scripts leave beside the weights is read with plain values alone; nothing is executed."""

from __future__ import annotations

import argparse
import builtins
import collections
import datetime
import decimal
import io
import os
import pickle
import sys
import types
import uuid
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvim.errors import UserError
from fastvim.weights import read

WEIGHTS = {"state_dict": {"backbone.a": torch.arange(3.0)}}


def scalars() -> list:
    """One of each kind, as a training script's numpy schedule leaves them."""
    return [np.dtype(kind).type(1) for kind in "?bhiqBHIQefdgFD"] + [np.str_("a"), np.bytes_(b"a")]


def records(monkeypatch) -> dict:
    """mmengine's record of a loss and its kind of dict, pickled as they pickle themselves."""
    buffers = types.ModuleType("mmengine.logging.history_buffer")
    configs = types.ModuleType("mmengine.config.config")

    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history = np.array([0.5, 0.25])
            self._count_history = np.array([1, 2])
            self._statistics_methods = {"mean": HistoryBuffer.mean}

        def mean(self) -> float:
            raise AssertionError("called")

    class ConfigDict(dict):
        def __reduce_ex__(self, protocol):
            return ConfigDict, (dict(self),), None, None, None

    for module, kind in ((buffers, HistoryBuffer), (configs, ConfigDict)):
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    HistoryBuffer.mean.__module__ = buffers.__name__
    for package in ("mmengine", "mmengine.logging", "mmengine.config"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    return {"loss": HistoryBuffer(), "config": ConfigDict(lr=1e-3)}


THINGS = {
    "scalars": scalars(),
    "arrays": [np.ones((2, 3), kind) for kind in "?biqBefdFD"],
    "odd arrays": [np.array(["ab", "c"]), np.zeros(2, "M8[s]"), np.array([1, "a", None], object)],
    "fields": np.zeros(2, [("x", "f4"), ("y", "i8")]),
    "kinds": [np.dtype("float16"), np.float32, np.int64],
    "ordered": collections.OrderedDict(a=[1, 2.5, None, True, 10**30, b"bytes", {1, 2}]),
    "defaults": collections.defaultdict(list, a=[1]),
    "counter": collections.Counter("abba"),
    "queue": collections.deque([1, 2], maxlen=3),
    "paths": [Path("/data/x"), Path("y")],
    "dates": [datetime.datetime(2024, 1, 2, 3, 4), datetime.timedelta(seconds=1)],
    "day": [datetime.date(2024, 1, 2), datetime.timezone.utc],
    "numbers": [decimal.Decimal("1.5"), uuid.UUID(int=7), 1 + 2j, range(3), frozenset({1})],
    "torch": [torch.Size([1, 2]), torch.float16, torch.device("cuda:1"), torch.__version__],
    "arguments": argparse.Namespace(lr=1e-3, nested=argparse.Namespace(path=Path("z"))),
    "namespace": types.SimpleNamespace(a=1),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("thing", THINGS)
def test_plain_things(thing, zipped, tmp_path):
    path = tmp_path / "file.ckpt"
    content = {"before": THINGS[thing], **WEIGHTS, "beside": {"deep": [THINGS[thing]]}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert torch.equal(read(path).state["a"], torch.arange(3.0))


@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_scalars_of_old_and_new_numpy(module, tmp_path):
    path, other = tmp_path / "file.ckpt", tmp_path / "other.ckpt"
    torch.save({**WEIGHTS, "lr": np.float64(0.1), "schedule": np.ones(3)}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy." in content
                for spelling in (b"numpy._core.", b"numpy.core."):
                    content = content.replace(spelling, f"{module}.".encode())
            target.writestr(name, content)
    assert torch.equal(read(other).state["a"], torch.arange(3.0))


@pytest.mark.parametrize("zipped", [True, False])
def test_records_of_mmengine(zipped, tmp_path, monkeypatch):
    path = tmp_path / "file.pth"
    with monkeypatch.context() as patch:
        content = {**WEIGHTS, "message_hub": records(patch)}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert b"getattr" in path.read_bytes()
    assert torch.equal(read(path).state["a"], torch.arange(3.0))
    assert "mmengine" not in sys.modules


class Stranger:
    """A class that no published tool leaves."""


class Calls:
    """Calls a function when it is unpickled without care."""

    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def evil(target: Path) -> dict[str, tuple[object, str]]:
    """What a file may want to do, and how it is named."""
    touch = f"touch {target}"
    write = f"open({str(target)!r}, 'w')"
    return {
        "a command": (Calls(os.system, touch), f"{os.system.__module__}.system"),
        "eval": (Calls(eval, write), "builtins.eval"),
        "exec": (Calls(exec, write), "builtins.exec"),
        "import": (Calls(builtins.__import__, "os"), "builtins.__import__"),
        "open": (Calls(open, str(target), "w"), ".open"),
        "a method": (Calls(Path.touch, target), "pathlib.Path.touch"),
        "a class": (Stranger(), f"{__name__}.Stranger"),
        "torch's own reader": (Calls(torch.load, str(target)), "torch.serialization.load"),
        "a pickle inside": (Calls(pickle.loads, b"N."), "pickle.loads"),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", list(evil(Path())))
def test_nothing_is_executed(kind, zipped, tmp_path):
    target, path = tmp_path / "owned", tmp_path / "file.ckpt"
    thing, name = evil(target)[kind]
    torch.save({"first": thing, **WEIGHTS}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert name in message
    assert "nothing in a file is executed" in message
    for word in ("\n", "\x1b", "weights_only", "safe_globals", "trust"):
        assert word not in message
    assert not target.exists()


@pytest.mark.parametrize("protocol", [4, 5])
def test_nothing_is_executed_in_a_plain_pickle(protocol, tmp_path):
    target, path = tmp_path / "owned", tmp_path / "file.pth"
    thing, name = evil(target)["a command"]
    path.write_bytes(pickle.dumps({"model": thing}, protocol=protocol))
    with pytest.raises(UserError, match=f"holds {name}") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert not target.exists()


def test_the_real_getattr_is_never_called(tmp_path, monkeypatch):
    """Nor is what a file gets by its stand-in."""
    path = tmp_path / "file.ckpt"
    torch.save({**WEIGHTS, "x": Calls(getattr, Path("."), "unlink")}, path)
    assert torch.equal(read(path).state["a"], torch.arange(3.0))
    stream = io.BytesIO()
    pickle.dump(Calls(Calls, 1), stream, protocol=2)
    path.write_bytes(stream.getvalue())
    with pytest.raises(UserError, match=f"holds {__name__}.Calls"):
        read(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files(share, zipped, tmp_path):
    path = tmp_path / "file.ckpt"
    state = {f"backbone.layers.{i}.weight": torch.randn(20, 20) for i in range(5)}
    torch.save({"state_dict": state, "lr": 0.1}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"file\.ckpt is damaged") as caught:
        read(path)
    assert "\n" not in str(caught.value)
