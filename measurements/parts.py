"""Inference in parts: 20,000 JPEG files by every way of spreading them, and ten million paths.

    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python measurements/parts.py [--images N] [--out FOLDER]

FastVim of 12 blocks on images of 112 pixels, a thread a process. Prints images/s of the bare loop,
alone and two at once, of one process with parts, of two shards at once, of three after a kill, and,
where Ray is installed, of Ray on three nodes of one core; whether all wrote the same parts, as a
second run over Ray whose driver, a worker and a node are killed; and the peak memory of listing a
thousand and ten million paths. Ends with 1 where a part differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastvim.inference.classify import Classify
from fastvim.inference.models import ModelChoice
from fastvim.models import create_model
from fastvim.weights import save

MODEL = "fastvim_tiny_patch16_224"
OPTIONS = {"img_size": 112, "depth": 12, "num_classes": 100}
SIZE = (160, 120)
LISTING = """
import re, sys
from pathlib import Path
from fastvim.inference.parts.listing import write_list
from fastvim.inference.parts.sources import Source
with open(sys.argv[2], "wb") as file:
    listing = write_list(file, Source(table=sys.argv[1]).items(None), 1024)
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())
print(int(peak[1]) // 1024, listing.rows)
"""


def prepare(folder: Path, count: int) -> tuple[Path, Path]:
    """Weights and a folder of images, a hundredth of them damaged."""
    weights, images = folder / "model.safetensors", folder / "images"
    torch.manual_seed(0)
    state = create_model(MODEL, **OPTIONS).state_dict()
    save(weights, state, {"model": MODEL, "model_args": OPTIONS, "img_size": 112})
    images.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        path = images / f"{number}.jpg"
        if path.exists():
            continue
        pixels = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(SIZE).save(path)
        if number % 100 == 99:
            path.write_bytes(path.read_bytes()[:300])
    return weights, images


def start(weights: Path, images: Path, out: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "fastvim_cli", "predict", "--model", weights, images]
    command += ["--out", out, *words]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([str(word) for word in command], **quiet)


def bare_loop(weights: Path, images: Path, count: int) -> float:
    """Images/s of reading and computing in batches of 32, without lists, parts or files."""
    opened = Classify(ModelChoice(str(weights))).open(torch.device("cpu"))
    paths = [str(images / f"{i}.jpg") for i in range(count) if i % 100 != 99]
    for begin in (0, 1):  # the first pass compiles the kernels
        clock = time.perf_counter()
        for i in range(0, len(paths) if begin else 64, 32):
            items = [{"path": path} for path in paths[i : i + 32]]
            batch = torch.stack([opened.read(item["path"]) for item in items])
            opened.rows(items, batch, None)
    return len(paths) / (time.perf_counter() - clock)


def bare_loops(weights: Path, images: Path, count: int, processes: int) -> float:
    """Images/s of several bare loops at once, in processes of their own: the sum."""
    words = [sys.executable, __file__, "--bare", str(weights), str(images), str(count)]
    pipe = subprocess.PIPE
    loops = [subprocess.Popen(words, stdout=pipe, text=True) for _ in range(processes)]
    return sum(float(loop.communicate()[0]) for loop in loops)


def parts_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "parts").glob("part-*"))}


def rate(out: Path, processes: int = 1, done: int = 0) -> float:
    """Images/s after each process could write one part, so without their start.

    Args:
        out: folder of the run.
        processes: that wrote it.
        done: number of parts that were there before.
    """
    times = sorted(path.stat().st_mtime for path in (out / "parts").glob("part-*"))[done:]
    return 1024 * (len(times) - processes) / (times[-1] - times[processes - 1])


def await_parts(out: Path, count: int) -> None:
    while len(list((out / "parts").glob("part-*.parquet"))) < count:
        time.sleep(0.05)


def over_ray(weights: Path, images: Path, out: Path, harmed: Path) -> float | None:
    """Images/s on three nodes of one core. None without Ray.

    Args:
        weights: file of the model.
        images: folder.
        out: of the run that is left alone.
        harmed: of a second one, whose driver is killed and started again, which then loses a
            worker and a node.
    """
    try:
        from ray.cluster_utils import Cluster
    except ImportError:
        return None
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    nodes = [cluster.add_node(**small) for _ in range(2)]
    cluster.wait_for_nodes()
    try:
        assert start(weights, images, out, "--ray", cluster.address).wait() == 0
        driver = start(weights, images, harmed, "--ray", cluster.address)
        await_parts(harmed, 3)
        driver.kill()
        driver.wait()
        driver = start(weights, images, harmed, "--ray", cluster.address)
        await_parts(harmed, 7)
        worker = subprocess.run(["pgrep", "-f", "^ray::_Actor"], capture_output=True, text=True)
        os.kill(int(worker.stdout.split()[0]), signal.SIGKILL)
        await_parts(harmed, 11)
        cluster.remove_node(nodes[0], allow_graceful=False)
        assert driver.wait() == 0
    finally:
        cluster.shutdown()
    return rate(out, 3)


def listing_memory(folder: Path) -> list[int]:
    """Peak memory in MiB of the lists of a thousand and of ten million paths."""
    found = []
    for count in (1_000, 10_000_000):
        table = folder / "list.csv"
        with table.open("w") as file:
            file.write("path\n")
            file.writelines(f"/data/plates/{i // 1000:05d}/{i:012d}.png\n" for i in range(count))
        words = [sys.executable, "-c", LISTING, str(table), str(folder / "list.jsonl")]
        told = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
        assert int(told[1]) == count
        found.append(int(told[0]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path("runs/parts"))
    parser.add_argument("--bare", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        weights, images, count = arguments.bare
        sys.stdout.write(f"{bare_loop(Path(weights), Path(images), int(count))}\n")
        return 0
    if {os.environ.get(name) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")} != {"1"}:
        parser.error("expected OMP_NUM_THREADS=1 and NUMBA_NUM_THREADS=1: a thread a process")
    folder = arguments.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    weights, images = prepare(folder, arguments.images)
    outs = {name: folder / name for name in ("one", "two", "three", "ray", "harmed")}
    for out in outs.values():
        shutil.rmtree(out, ignore_errors=True)

    told: dict[str, object] = {"images": arguments.images, "cores": os.cpu_count()}
    few = min(arguments.images, 4000)
    told["bare loop"] = bare_loops(weights, images, few, 1)
    told["two bare loops at once"] = bare_loops(weights, images, few, 2)
    assert start(weights, images, outs["one"]).wait() == 0
    told["one process"] = rate(outs["one"])
    pair = [start(weights, images, outs["two"], "--shard", f"{i}/2") for i in (1, 2)]
    assert [process.wait() for process in pair] == [0, 0]
    told["two shards"] = rate(outs["two"], 2)
    pair = [start(weights, images, outs["three"], "--shard", f"{i}/2") for i in (1, 2)]
    await_parts(outs["three"], 4)
    for process in pair:
        process.kill()
        process.wait()
    there = len(parts_of(outs["three"]))
    three = [start(weights, images, outs["three"], "--shard", f"{i}/3") for i in (1, 2, 3)]
    assert [process.wait() for process in three] == [0, 0, 0]
    told["three shards after a kill"] = rate(outs["three"], 3, there)
    told["Ray"] = over_ray(weights, images, outs["ray"], outs["harmed"])
    told["MiB of a thousand and of ten million paths"] = listing_memory(folder)
    expected = parts_of(outs["one"])
    same = {n: parts_of(out) == expected for n, out in outs.items() if out.exists()}
    told["the same parts"] = same
    sys.stdout.write(json.dumps(told, indent=1) + "\n")
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
