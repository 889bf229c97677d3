"""Samplers and loaders that resume exactly.

The order of the training samples is a function of (seed, epoch), the augmentation of a sample a
function of (seed, epoch, sample). Neither depends on the number of workers. A run resumed from any
checkpoint of Lightning continues with the batches that it would have seen without the interruption.
The loaders do not touch the global random generators, which the model uses.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torch.utils.data.distributed import DistributedSampler

from fastvim.data.workers import WatchedLoader
from fastvim.errors import OptionError, UserError, counted

if TYPE_CHECKING:
    import lightning as L


class TrainingSampler(DistributedSampler[Any]):
    """Yields (epoch, index) pairs in an order drawn from (seed, epoch).

    The pair tells a persistent worker the epoch. Ranks take turns, so the global batches do not
    depend on the number of processes; samples that do not divide evenly among them are dropped. It
    is a `DistributedSampler` so that Lightning does not wrap it in one.

    Args:
        dataset: a dataset with a length.
        seed: at least 0.
        epoch: the epoch to begin with.
        skip: samples of this rank to skip at the start of that epoch; the length stays that of a
            whole epoch, since Lightning counts the skipped batches too.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        seed: int,
        *,
        epoch: int = 0,
        skip: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(dataset, world_size, rank, seed=seed, drop_last=True)
        self.epoch = epoch
        self.skip = skip

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch`, whole unless it is the one that the sampler was built to resume."""
        if epoch != self.epoch:
            self.epoch, self.skip = epoch, 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # Not a generator function, which would read the epoch only when the first sample is drawn.
        epoch = self.epoch
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        order = torch.randperm(self._dataset_size, generator=generator)
        mine = order[self.rank : self.total_size : self.num_replicas]
        return ((epoch, index) for index in mine[self.skip :].tolist())

    @property
    def _dataset_size(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


class EvaluationSampler(DistributedSampler[Any]):
    """Yields every index once, in order. Ranks take turns; no sample is repeated."""

    def __init__(self, dataset: Dataset[Any], *, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(dataset, world_size, rank, shuffle=False)
        self._indices = range(rank, len(dataset), world_size)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


class Seeded(Dataset[Any]):
    """A dataset whose samples draw their random numbers from (seed, epoch, index)."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: tuple[int, int] | int) -> Any:
        epoch, index = _epoch_and_index(key)
        if get_worker_info() is not None:  # nothing else draws in a loading process
            _seed(self.seed, epoch, index)
            return self.dataset[index]
        with seeded(self.seed, epoch, index):
            return self.dataset[index]

    def __getitems__(self, keys: Sequence[tuple[int, int] | int]) -> list[Any]:
        """The samples of a batch: what torch's loader calls."""
        if (read_ahead := getattr(self.dataset, "read_ahead", None)) is not None:
            read_ahead([_epoch_and_index(key)[1] for key in keys])
        return [self[key] for key in keys]


def _epoch_and_index(key: tuple[int, int] | int) -> tuple[int, int]:
    # Lightning's overfit_batches replaces our sampler by one that yields plain indices.
    return key if isinstance(key, tuple) else (0, key)


class ResumableLoader(WatchedLoader):
    """A loader that Lightning resumes in the middle of an epoch without a warning.

    It has no state: the position comes from the trainer's progress (`resume_point`), which is
    restored from every checkpoint. Lightning restores loaders only in the middle of an epoch.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class StreamLoader(ResumableLoader):
    """A loader of an iterable dataset of timm.

    Lightning passes the epoch to samplers only, and a stream has none. So this loader passes it to
    the dataset and seeds the workers from (seed, epoch). The order and the augmentation depend on
    the number of workers. Resuming reads and drops the batches already seen.
    """

    def __init__(
        self,
        dataset: IterableDataset[Any],
        *,
        seed: int,
        trainer: L.Trainer | None,
        **settings: Any,
    ) -> None:
        self.seed = seed
        self.trainer = trainer
        super().__init__(dataset, **settings)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        epoch, batches_done = resume_point(self.trainer)
        assert self.generator is not None
        self.generator.manual_seed(mix(self.seed, epoch))
        self.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        return islice(super().__iter__(), batches_done, None)


def training_loader(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    num_workers: int,
    seed: int,
    timeout: float = 0,
    trainer: L.Trainer | None = None,
) -> WatchedLoader:
    """Shuffled, exactly resumable batches; an incomplete last batch is dropped.

    Args:
        dataset: map-style, or an iterable dataset of timm.
        batch_size: per process.
        num_workers: per process; a stream uses at least one, since in the main process it would
            draw from the model's generators.
        seed: at least 0.
        timeout: seconds that a worker may take for a batch before it is said to hang; 0 for any.
        trainer: gives rank, number of processes and the point to resume from.

    Raises:
        UserError: when the dataset is smaller than one batch of every process, or has fewer shards
            than there are workers in all processes.
    """
    settings = _settings(batch_size, num_workers, seed, timeout)
    if isinstance(dataset, IterableDataset):
        workers = max(1, num_workers)
        _check_shards(dataset, workers, trainer)
        dataset.set_loader_cfg(num_workers=workers)  # type: ignore[attr-defined]
        # Workers of a stream are seeded when they start, so they start again every epoch.
        settings |= {"num_workers": workers, "persistent_workers": False}
        return StreamLoader(dataset, seed=seed, trainer=trainer, drop_last=True, **settings)
    rank, world_size = _place(trainer)
    size = len(dataset)  # type: ignore[arg-type]
    if size < batch_size * world_size:
        places = f" for {world_size} processes" if world_size > 1 else ""
        expected = f"{size // world_size} or less, as the training split has {size} images{places}"
        raise OptionError("batch_size", batch_size, expected)
    epoch, batches_done = resume_point(trainer)
    sampler = TrainingSampler(
        dataset,
        seed,
        epoch=epoch,
        skip=batches_done * batch_size,
        rank=rank,
        world_size=world_size,
    )
    return ResumableLoader(Seeded(dataset, seed), sampler=sampler, drop_last=True, **settings)


def evaluation_loader(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    num_workers: int,
    seed: int,
    timeout: float = 0,
    trainer: L.Trainer | None = None,
) -> WatchedLoader:
    """Every sample once, in order, divided among the processes without repetition.

    The arguments are those of `training_loader`. Batches may be a little larger than `batch_size`,
    so that every process has the same number of them.

    Raises:
        UserError: when there are fewer samples than processes.
    """
    settings = _settings(batch_size, num_workers, seed, timeout)
    if isinstance(dataset, IterableDataset):
        if _place(trainer)[1] > 1:  # else a worker without a shard is merely idle
            _check_shards(dataset, max(1, num_workers), trainer)
        dataset.set_loader_cfg(num_workers=num_workers)  # type: ignore[attr-defined]
        return WatchedLoader(dataset, **settings)
    rank, world_size = _place(trainer)
    size = len(dataset)  # type: ignore[arg-type]
    if size < world_size:
        raise UserError(f"{size} images for {world_size} processes: expected one each at least")
    settings["batch_size"] = even_batch_size(size, world_size, batch_size)
    sampler = EvaluationSampler(dataset, rank=rank, world_size=world_size)
    return WatchedLoader(dataset, sampler=sampler, **settings)


def even_batch_size(size: int, world_size: int, batch_size: int) -> int:
    """The smallest batch size from `batch_size` up for which all ranks have as many batches.

    A rank has `size // world_size` samples (at least one) or one more. A rank with an extra batch
    would hang in that batch's first collective operation.
    """
    while size % world_size and (size // world_size) % batch_size == 0:
        batch_size += 1
    return batch_size


def resume_point(trainer: L.Trainer | None) -> tuple[int, int]:
    """The epoch to serve next and how many batches of it are done, (0, 0) in a fresh run.

    Lightning requests the training loader, whose workers then prefetch, before it sets the
    sampler's epoch and before it updates its own counters after loading a checkpoint. So the
    counters are read here as the checkpoint has them: an interrupted epoch continues after its
    last processed batch, or is complete if that was the last one.
    """
    if trainer is None:
        return 0, 0
    loop = trainer.fit_loop
    epochs: Any = loop.epoch_progress.current
    batches: Any = loop.epoch_loop.batch_progress
    if not loop.restarting or epochs.started == epochs.processed:
        return epochs.processed, 0
    if batches.is_last_batch:
        return epochs.processed + 1, 0
    return epochs.processed, batches.current.processed


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed `random`, numpy and torch (CPU) from `key`; restore their states at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _seed(*key)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed(*key: int) -> None:
    # An array of 32 bits is the same key as its numbers, which would be arrays of their own first.
    short = max(key) < 1 << 32
    entropy: Any = np.array(key, np.uint32) if short else key
    first, second, third = np.random.SeedSequence(entropy).generate_state(3).tolist()
    random.seed(first)
    np.random.seed(second)
    torch.default_generator.manual_seed(third)  # torch.manual_seed would seed GPUs as well


def mix(*key: int) -> int:
    """One seed from several numbers of at least 0; different keys give different seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def _check_shards(dataset: IterableDataset[Any], workers: int, trainer: L.Trainer | None) -> None:
    """Require a shard for each worker of all processes; one without would have no batches.

    Args:
        dataset: timm's; that of `wds/` tells its shards.
        workers: of this process.
        trainer: of `training_loader`.
    """
    split = getattr(getattr(dataset, "reader", None), "split_info", None)
    _, size = _place(trainer)
    if split is None or len(split.filenames) >= workers * size:
        return
    shards = counted(len(split.filenames), "shards")
    if len(split.filenames) < size:
        raise UserError(f"{shards} for {size} processes: expected one each at least")
    places = f" for {size} processes" if size > 1 else ""
    expected = f"{len(split.filenames) // size} or less, as the split has {shards}{places}"
    raise OptionError("num_workers", workers, expected)


def _place(trainer: L.Trainer | None) -> tuple[int, int]:
    return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)


def _settings(batch_size: int, num_workers: int, seed: int, timeout: float) -> dict[str, Any]:
    return {
        "batch_size": batch_size,
        "num_workers": num_workers,
        "patience": timeout,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        # Without a generator, a loader draws the workers' seed from the global one.
        "generator": torch.Generator().manual_seed(seed),
    }
