"""The order of samples, their random numbers, and their division among processes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset

from fastvim.data.sampler import (
    EvaluationSampler,
    Seeded,
    TrainingSampler,
    evaluation_loader,
    even_batch_size,
    seeded,
    training_loader,
)
from fastvim.errors import UserError


class Noise(Dataset):
    """Each sample: its index and one number from each of the three generators."""

    def __init__(self, size: int = 22) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))])


class Stream(IterableDataset):
    """What the loaders need of timm's iterable datasets; its workers share the numbers 0..11."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def set_loader_cfg(self, num_workers: int) -> None:
        self.num_workers = num_workers

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        info = torch.utils.data.get_worker_info()
        for index in range(info.id, 12, info.num_workers):
            yield 100 * self.epoch + index, torch.rand(())


class Shards(Stream):
    """The same with the facts of its shards, where timm's reader of `wds/` has them."""

    def __init__(self, number: int) -> None:
        names = tuple(f"{index}.tar" for index in range(number))
        self.reader = SimpleNamespace(split_info=SimpleNamespace(filenames=names))


def place(rank: int, world_size: int) -> Any:
    """What the loaders ask of a trainer that begins."""
    epochs = SimpleNamespace(started=0, processed=0)
    loop = SimpleNamespace(
        restarting=False,
        epoch_progress=SimpleNamespace(current=epochs),
        epoch_loop=SimpleNamespace(batch_progress=None),
    )
    return SimpleNamespace(global_rank=rank, world_size=world_size, fit_loop=loop)


@pytest.mark.parametrize(
    ("shards", "workers", "processes", "message"),
    [
        (2, 4, 1, "num_workers 4: expected 2 or less, as the split has 2 shards"),
        (5, 3, 2, "num_workers 3: expected 2 or less, as the split has 5 shards for 2 processes"),
        (1, 0, 2, "1 shard for 2 processes: expected one each at least"),
    ],
)
def test_fewer_shards_than_workers(shards, workers, processes, message) -> None:
    settings = {"batch_size": 2, "num_workers": workers, "seed": 0, "trainer": place(0, processes)}
    with pytest.raises(UserError, match=f"^{message}$"):
        training_loader(Shards(shards), **settings)
    if processes > 1:
        with pytest.raises(UserError, match=f"^{message}$"):
            evaluation_loader(Shards(shards), **settings)
    else:  # each image once, by the workers that have a shard
        assert evaluation_loader(Shards(shards), **settings).num_workers == workers


@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (2, 1), (2, 2), (1, 4)])
def test_a_shard_for_each_worker(workers, processes) -> None:
    settings = {"batch_size": 2, "num_workers": workers, "seed": 0, "trainer": place(0, processes)}
    assert training_loader(Shards(4), **settings).num_workers == max(1, workers)
    assert evaluation_loader(Shards(4), **settings).num_workers == workers


def test_order_is_drawn_from_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        return list(TrainingSampler(Noise(), seed, epoch=epoch))

    assert order(0, 1) == order(0, 1)
    assert sorted(order(0, 1)) == [(1, index) for index in range(22)]
    orders = [tuple(i for _, i in order(*key)) for key in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len(set(orders)) == 4


def test_skipping_belongs_to_one_epoch() -> None:
    sampler = TrainingSampler(Noise(), 0, epoch=2, skip=8)
    whole = list(TrainingSampler(Noise(), 0, epoch=2))
    sampler.set_epoch(2)
    assert list(sampler) == whole[8:]
    assert len(sampler) == 22
    sampler.set_epoch(3)
    assert len(list(sampler)) == 22


def test_the_epoch_is_settled_when_iteration_begins() -> None:
    sampler = TrainingSampler(Noise(), 0)
    begun = iter(sampler)
    sampler.set_epoch(1)
    assert next(begun)[0] == 0


def test_ranks_share_the_global_batches_of_one_process() -> None:
    alone = [index for _, index in TrainingSampler(Noise(), 5)]
    ranks = [[i for _, i in TrainingSampler(Noise(), 5, rank=r, world_size=4)] for r in range(4)]
    assert [len(rank) for rank in ranks] == [5] * 4
    assert [i for turn in zip(*ranks, strict=True) for i in turn] == alone[:20]


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 40))
def test_evaluation_ranks_share_every_sample_once_in_as_many_batches(
    size: int, world_size: int, batch_size: int
) -> None:
    if size < world_size:
        return
    samplers = [
        EvaluationSampler(Noise(size), rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert sorted(index for sampler in samplers for index in sampler) == list(range(size))
    even = even_batch_size(size, world_size, batch_size)
    assert batch_size <= even <= max(batch_size, size // world_size + 1)
    assert len({-(-len(sampler) // even) for sampler in samplers}) == 1


def test_seeded_gives_the_generators_back() -> None:
    noise = Noise()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    expected = [noise[0][1] for _ in range(2)]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    first = noise[0][1]
    with pytest.raises(KeyError), seeded(1, 2, 3):
        raise KeyError
    torch.testing.assert_close([first, noise[0][1]], expected, rtol=0, atol=0)


@given(st.tuples(*[st.one_of(st.integers(0, 9), st.integers(0, 2**70))] * 3))
def test_seeds_are_those_of_the_key(key: tuple[int, int, int]) -> None:
    """Runs go on from checkpoints of earlier versions."""
    first, second, third = np.random.SeedSequence(key).generate_state(3).tolist()
    expected = [
        random.Random(first).random(),
        np.random.RandomState(second).random(),
        torch.rand(1, generator=torch.Generator().manual_seed(third)).item(),
    ]
    with seeded(*key):
        assert [random.random(), np.random.random(), torch.rand(1).item()] == expected


def test_samples_draw_from_seed_epoch_and_index() -> None:
    data = Seeded(Noise(), 4)
    assert torch.equal(data[1, 2][1], data[1, 2][1])
    keys = [(0, 0), (0, 1), (1, 0)]
    drawn = torch.stack([data[key][1] for key in keys] + [Seeded(Noise(), 5)[0, 0][1]])
    assert len(drawn.unique()) == drawn.numel()
    assert torch.equal(data[3][1], data[0, 3][1])  # plain indices, from overfit_batches


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_workers(workers: int) -> None:
    def batches(num_workers: int) -> list[list[torch.Tensor]]:
        return list(training_loader(Noise(), batch_size=4, num_workers=num_workers, seed=1))

    torch.testing.assert_close(batches(workers), batches(0), rtol=0, atol=0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [training_loader, evaluation_loader])
def test_loaders_leave_the_global_generators_alone(make, workers: int) -> None:
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    list(make(_Constant(), batch_size=4, num_workers=workers, seed=0))
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


class _Constant(Noise):
    def __getitem__(self, index: int) -> int:
        return index


def test_too_few_images_for_a_batch() -> None:
    with pytest.raises(UserError, match=r"batch_size 23: expected 22 or less"):
        training_loader(Noise(), batch_size=23, num_workers=0, seed=0)


def test_stream_learns_its_epoch_and_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    def batches(epoch: int, done: int) -> list[list[torch.Tensor]]:
        monkeypatch.setattr("fastvim.data.sampler.resume_point", lambda _: (epoch, done))
        return list(training_loader(Stream(), batch_size=2, num_workers=2, seed=1))

    whole = batches(3, 0)
    assert sorted(torch.cat([b[0] for b in whole]).tolist()) == list(range(300, 312))
    torch.testing.assert_close(batches(3, 2), whole[2:], rtol=0, atol=0)
    assert not torch.equal(batches(4, 0)[0][1], whole[0][1])
