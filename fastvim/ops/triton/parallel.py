"""Kernels compiled by threads: Triton's compiler holds Python's lock for a tenth of its time.

Triton keeps what it compiles on the disk and in the process, where a later launch finds it.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.cache import get_cache_manager

from fastvim.machine import cores
from fastvim.ops.triton.ahead import Request
from fastvim.storage import alone

_logger = logging.getLogger(__name__)

# Of kernels that two threads load at once, one may get the other's launcher.
_loading = Lock()


class _Job(NamedTuple):
    """A kernel to compile.

    Attributes:
        device: for which.
        name: of the kernel.
        size: characters of its source.
        key: of its files on the disk.
        compile: compiles it, or reads it from the disk.
        keep: gives it to the launches of this process.
    """

    device: torch.device
    name: str
    size: int
    key: str
    compile: Callable[[], Any]
    keep: Callable[[Any], None]

    @property
    def missing(self) -> bool:
        """Whether it is not on the disk."""
        folder = get_cache_manager(hashlib.sha256(self.key.encode()).hexdigest())
        return folder.get_group(f"{self.name[:150]}.json") is None

    def run(self) -> None:
        """Compile and load it."""
        try:
            with torch.cuda.device(self.device):
                kernel = self.compile()
                self.keep(kernel)
                with _loading:
                    kernel[1, 1, 1]  # loads it, and has a C compiler make its launcher
        except Exception as error:  # the launch compiles it again, and raises it
            _logger.debug("%s: %s", self.name, error)


class _Collected(triton.AsyncCompileMode):
    """Triton's way to hand a compilation over. It takes the jobs and starts none."""

    def __init__(self) -> None:
        super().__init__(executor=None)
        self.jobs: dict[str, _Job] = {}

    def add(self, request: Request) -> None:
        """Note the kernel of a launch, unless this process has compiled it."""
        self._request = request
        with torch.cuda.device(request.device):
            request.kernel.warmup(*request.arguments, grid=(1,), **request.options)

    def submit(
        self, key: str, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]
    ) -> None:
        """Called by `warmup`; nothing is compiled yet, so it has no kernel to keep."""
        request = self._request
        name, size = request.kernel.fn.__name__, len(request.kernel.src)
        self.jobs[key] = _Job(request.device, name, size, key, compile_fn, finalize_fn)


def compile_all(requests: Iterable[Request]) -> None:
    """Compile the kernels of launches, or load them from the disk, with a thread on each core.

    A kernel that does not compile is compiled again at its launch, which raises the error.
    Of several processes that share Triton's folder one compiles and says so; the others wait, and
    find the kernels on the disk.
    """
    with _Collected() as collected:
        for request in requests:
            collected.add(request)
    # Those that take longest begin first: two kernels of 22 take 15 s and 10 s of all 45.
    jobs = sorted(collected.jobs.values(), key=lambda job: job.size, reverse=True)
    with ThreadPoolExecutor(cores()) as pool:
        if any(job.missing for job in jobs):
            with alone(Path(triton.knobs.cache.dir) / "fastvim.lock"):
                missing = [job for job in jobs if job.missing]
                if missing:
                    device = torch.cuda.get_device_name(missing[0].device)
                    _logger.warning("compiling %d kernels for %s, once", len(missing), device)
                    begun = time.monotonic()
                    [*pool.map(_Job.run, missing)]
                    seconds = time.monotonic() - begun
                    _logger.warning("compiled %d kernels in %.0f s", len(missing), seconds)
                    jobs = [job for job in jobs if job not in missing]
        [*pool.map(_Job.run, jobs)]
