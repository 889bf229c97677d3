"""Parts over a Ray cluster of several nodes on this machine: what is lost costs time, no rows."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest
import torch
from toy_work import Quiet, Toy, write_files

from fastvim.errors import UserError
from fastvim.inference.parts.run import Plan, run_parts
from fastvim.inference.parts.sources import Source

IMAGES, PART = 300, 10


def run(folder, out, work=None, **plan):
    listener = Quiet()
    source = Source((str(folder),))
    plan = Plan(torch.device("cpu"), PART, **plan)
    return run_parts(work or Toy(), source, str(out), plan, listener), listener


def test_without_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    write_files(tmp_path / "files", 3)
    with pytest.raises(UserError, match=r"--ray auto: ray is not installed: .*fastvim\[ray\]"):
        run(tmp_path / "files", tmp_path / "out", ray="auto")


@pytest.fixture(scope="module")
def cluster():
    """Three nodes of one core each."""
    pytest.importorskip("ray")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
        here = os.path.dirname(__file__)  # actors import the toy
        patch.setenv("PYTHONPATH", os.pathsep.join([here, *sys.path]))
        small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
        cluster = cluster_utils.Cluster(
            initialize_head=True, head_node_args={**small, "include_dashboard": False}
        )
        for _ in range(2):
            cluster.add_node(**small)
        cluster.wait_for_nodes()
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_files(folder, IMAGES)
    return folder


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run(folder, out)
    return parts_of(out)


def parts_of(out):
    return {path.name: path.read_bytes() for path in sorted((out / "parts").glob("part-*"))}


def wait_for_parts(out, count):
    deadline = time.monotonic() + 120
    while len(list((out / "parts").glob("part-*.parquet"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_the_same_parts(cluster, folder, whole, tmp_path):
    outcome, listener = run(folder, tmp_path, ray=cluster.address)
    assert parts_of(tmp_path) == whole
    assert listener.images == IMAGES
    assert len(listener.failures) == outcome.failed > 0
    assert sum(outcome.opened.heard) == IMAGES - sum(n % 7 == 6 for n in range(IMAGES))


@pytest.mark.slow
def test_a_mistake_is_the_users(cluster, folder, tmp_path):
    with pytest.raises(UserError, match="no cluster"):
        run(folder, tmp_path / "a", ray="127.0.0.1:1")
    with pytest.raises(UserError, match="other weights than the run's"):
        run(folder, tmp_path / "b", Unlike(), ray=cluster.address)


class Unlike(Toy):
    """Other weights in other processes."""

    parent = os.getpid()

    def __init__(self):
        super().__init__()
        self.parent = os.getpid()

    def open(self, device):
        opened = super().open(device)
        opened.weights += "" if os.getpid() == self.parent else "x"
        return opened


def _drive(folder, out, address):
    run(folder, out, Toy(seconds=0.02), ray=address)


@pytest.mark.slow
def test_a_lost_worker_a_lost_node_and_another_driver(cluster, folder, whole, tmp_path):
    import ray

    context = multiprocessing.get_context("spawn")
    arguments = (folder, tmp_path, cluster.address)
    driver = context.Process(target=_drive, args=arguments)
    driver.start()
    wait_for_parts(tmp_path, 3)
    driver.kill()
    driver.join()
    node = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)

    def harm():
        before = len(parts_of(tmp_path))
        wait_for_parts(tmp_path, before + 3)
        for process in actors():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            break
        wait_for_parts(tmp_path, before + 6)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=harm)
    thread.start()
    outcome, _ = run(folder, tmp_path, Toy(seconds=0.02), ray=cluster.address)
    thread.join()
    assert not ray.is_initialized()
    assert outcome.missing == 0
    assert parts_of(tmp_path) == whole


def actors():
    """The processes of the actors, on this machine."""
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
            if file.read().startswith(b"ray::_Actor"):
                found.append(int(name))
    return found
