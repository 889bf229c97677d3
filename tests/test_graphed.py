"""Training through captured graphs: the same steps as without, and what is not captured."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastvim.graphed import GraphedModel, _Recorded
from fastvim.models import FastVim, MaskedAutoencoder

SHAPE = (4, 3, 32, 24)


def tiny(device: str = "cuda", **options) -> FastVim:
    torch.manual_seed(0)
    model = FastVim(img_size=32, patch_size=8, embed_dim=16, depth=2, num_classes=5, **options)
    return model.to(device)


def batch(seed: int, shape: tuple[int, ...] = SHAPE, device: str = "cuda") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def backward(run, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The logits of a forward pass that a backward pass has followed."""
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        logits = run(images)
    F.cross_entropy(logits.float(), torch.arange(len(logits), device=images.device)).backward()
    return logits


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in model.parameters()]


def weights_after(run, model: nn.Module, device: str, dtype: torch.dtype | None) -> list[Tensor]:
    """After a few steps of an optimiser, each with a seed of its own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(5):
        torch.manual_seed(step)
        optimizer.zero_grad()
        backward(run, batch(step, device=device), dtype)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(ours: list, expected: list) -> None:
    """Equal to the bit."""
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("lends", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_steps_are_those_of_the_model(device, dtype, lends):
    model = tiny(device, drop_path_rate=0.5).train()
    twin = copy.deepcopy(model)
    graphed = GraphedModel(model, lends=lends)
    ours = weights_after(graphed, model, device, dtype)
    same(ours, weights_after(twin, twin, device, dtype))
    assert graphed.captured == (device == "cuda")
    assert graphed.reason is None


@pytest.mark.parametrize("lends", [False, True])
def test_gradients_accumulate_and_belong_to_the_caller(device, lends):
    model = tiny(device).train()
    twin, graphed = copy.deepcopy(model), GraphedModel(model, lends=lends)
    kept = []
    for seed in range(3):
        logits = backward(graphed, batch(seed, device=device))
        kept.append((logits, logits.clone()))
        backward(twin, batch(seed, device=device))
    same(gradients(model), gradients(twin))
    for logits, before in kept:
        assert torch.equal(logits, before)


def test_a_copy_is_a_model_of_its_own(device):
    model = tiny(device).train()
    graphed = GraphedModel(model)
    backward(graphed, batch(0, device=device))
    model.zero_grad()
    twin = copy.deepcopy(graphed)
    assert not twin.captured
    backward(twin, batch(0, device=device))
    assert gradients(twin)[0] is not None
    assert gradients(model)[0] is None


@pytest.mark.gpu
def test_gradients_are_copied_once_and_not_overwritten(monkeypatch):
    returned = []
    replay = _Recorded.backward

    def spy(*args):
        gradients = replay(*args)
        returned[:] = [gradient.data_ptr() for gradient in gradients]
        return gradients

    monkeypatch.setattr(_Recorded, "backward", spy)
    model = tiny().train()
    twin, graphed = copy.deepcopy(model), GraphedModel(model)
    kept = []
    for seed in range(2):
        for run, part in ((graphed, model), (twin, twin)):
            part.zero_grad()
            backward(run, batch(seed))
        assert returned == [gradient.data_ptr() for gradient in gradients(model)]
        kept.append((gradients(model), gradients(twin)))
    for ours, expected in kept:
        same(ours, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("to_none", [True, False])
def test_lent_gradients_lie_as_parameters_do_and_are_the_last_ones(to_none):
    model = tiny().train()
    twin, graphed = copy.deepcopy(model), GraphedModel(model, lends=True)
    places = []
    for seed in range(4):
        for run, part in ((graphed, model), (twin, twin)):
            part.zero_grad(set_to_none=to_none)
            backward(run, batch(seed))
        same(gradients(model), gradients(twin))
        every = [p for p in model.parameters() if p.grad is not None]
        assert all(p.grad.stride() == p.stride() for p in every)
        places.append([p.grad.untyped_storage().data_ptr() for p in every])
        assert len(set(places[-1])) == len(every)
    assert not to_none or places.count(places[0]) == 4


@pytest.mark.gpu
def test_hooks_of_parameters_are_called():
    model = tiny().train()
    graphed, heard = GraphedModel(model, lends=True), []
    next(model.parameters()).register_hook(lambda gradient: heard.append(gradient))
    for seed in range(2):
        model.zero_grad()
        backward(graphed, batch(seed))
    assert len(heard) == 2


@pytest.mark.gpu
@pytest.mark.parametrize(
    "images", [batch(1, (2, 3, 32, 24), "cpu"), batch(1, (4, 3, 40, 24), "cpu")], ids=["B", "H"]
)
def test_another_shape_runs_eagerly(images):
    model = tiny().train()
    twin, graphed = copy.deepcopy(model), GraphedModel(model)
    backward(graphed, batch(0))
    model.zero_grad()
    backward(graphed, images.cuda())
    backward(twin, images.cuda())
    same(gradients(model), gradients(twin))


@pytest.mark.gpu
def test_evaluation_and_gradients_of_images_are_not_captured():
    model = tiny().train()
    graphed = GraphedModel(model)
    images = batch(0).requires_grad_()
    backward(graphed, images)
    assert images.grad is not None
    with torch.no_grad():
        graphed(batch(0))
    model.eval()
    backward(graphed, batch(0))
    assert not graphed.captured


@pytest.mark.gpu
def test_weights_loaded_in_place_are_seen():
    model, other = tiny().train(), tiny().train()
    nn.init.normal_(other.head.weight)
    graphed = GraphedModel(model)
    backward(graphed, batch(0))
    model.load_state_dict(other.state_dict())
    model.zero_grad()
    backward(graphed, batch(1))
    backward(other, batch(1))
    same(gradients(model), gradients(other))


@pytest.mark.gpu
def test_what_is_trained_may_change():
    model = tiny().train()
    twin, graphed = copy.deepcopy(model), GraphedModel(model)
    for seed, names in enumerate(["head", "", "blocks.1", "head"]):
        for part in (model, twin):
            part.zero_grad()
            for name, parameter in part.named_parameters():
                parameter.requires_grad_(name.startswith(names))
        backward(graphed, batch(seed))
        backward(twin, batch(seed))
        assert graphed.captured
        same(gradients(model), gradients(twin))


class Normed(nn.Module):
    """Running statistics, a frozen parameter and an unused one; several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 5)
        self.norm = nn.BatchNorm1d(5)
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, images: Tensor) -> dict[str, Tensor | tuple[Tensor, ...]]:
        logits = self.norm(self.linear(images.mean(dim=(1, 2))))
        return {"logits": logits * self.frozen, "more": (logits.argmax(dim=1), 2 * logits)}


@pytest.mark.gpu
def test_buffers_outputs_and_parameters_without_gradients():
    torch.manual_seed(0)
    model = Normed().cuda().train()
    twin, graphed = copy.deepcopy(model), GraphedModel(model)
    for seed in range(3):
        ours, expected = graphed(batch(seed)), twin(batch(seed))
        assert list(ours) == ["logits", "more"]
        assert not ours["more"][0].requires_grad
        same([ours["logits"], *ours["more"]], [expected["logits"], *expected["more"]])
        for run in (ours, expected):
            (run["logits"].square().sum() + run["more"][1].sum()).backward()
    assert graphed.captured
    same(list(model.buffers()), list(twin.buffers()))
    same(gradients(model), gradients(twin))
    assert model.unused.grad is None


@pytest.mark.gpu
def test_a_masked_autoencoder():
    torch.manual_seed(0)
    model = MaskedAutoencoder(
        img_size=32,
        patch_size=8,
        embed_dim=16,
        depth=2,
        decoder_embed_dim=16,
        decoder_depth=1,
    )
    model.cuda().train()
    twin, graphed = copy.deepcopy(model), GraphedModel(model)
    losses = []
    for run in (graphed, twin):
        for seed in range(3):
            torch.manual_seed(seed)
            output = run(batch(seed, (4, 3, 32, 32)))
            output.loss.backward()
            losses.append(output.loss.detach())
    assert graphed.captured
    same(losses[:3], losses[3:])
    assert len({float(loss) for loss in losses}) == 3
    same(gradients(model), gradients(twin))


@pytest.mark.gpu
def test_the_passes_alternate():
    graphed = GraphedModel(tiny().train())
    first, second = graphed(batch(0)).sum(), graphed(batch(1)).sum()
    with pytest.raises(RuntimeError, match="must follow its forward pass, once"):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="must follow its forward pass, once"):
        second.backward()


class Reads(nn.Linear):
    """Looks at a value on the host, which no graph can hold."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images.mean(dim=(1, 2)))
        return logits * logits.mean().item()


@pytest.mark.gpu
def test_a_model_that_cannot_be_captured_runs_eagerly(caplog):
    graphed = GraphedModel(Reads(24, 5).cuda())
    for seed in range(2):
        backward(graphed, batch(seed))
    assert not graphed.captured
    assert "synchronises with the GPU" in graphed.reason
    assert [record.getMessage() for record in caplog.records] == [
        f"training eagerly: {graphed.reason}"
    ]


@pytest.mark.gpu
def test_synchronised_batch_norms_and_nothing_to_train():
    synchronised = GraphedModel(nn.SyncBatchNorm.convert_sync_batchnorm(Normed().cuda()))
    synchronised._record(batch(0))
    assert synchronised.reason == "the batch norms wait for other processes"
    frozen = GraphedModel(tiny().requires_grad_(False).train())
    frozen(batch(0))
    assert frozen.reason == "there is nothing to train"


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:.*AccumulateGrad")
def test_inside_distributed_data_parallel(tmp_path):
    dist.init_process_group("nccl", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny().train()
        twin, graphed = copy.deepcopy(model), GraphedModel(model)
        parallel = DistributedDataParallel(graphed, device_ids=[0])
        ours = weights_after(parallel, model, "cuda", torch.bfloat16)
        same(ours, weights_after(twin, twin, "cuda", torch.bfloat16))
        assert graphed.captured
        with pytest.raises(ValueError, match="around the GraphedModel"):
            GraphedModel(parallel)
    finally:
        dist.destroy_process_group()


def test_no_warmup():
    with pytest.raises(ValueError, match="warmup=0: expected 1 or more"):
        GraphedModel(tiny("cpu"), warmup=0)
