"""Which parameters decay, at which rate each layer learns, and how the rate moves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

import fastvim  # noqa: F401  registers the models
from fastvim.tasks.optim import ListedAdamW, make_adamw, parameter_groups, place_steps
from fastvim.tasks.schedules import Schedule, cosine_by_epochs

DEPTH = 6


@pytest.fixture
def model():
    return timm.create_model(
        "fastvim_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=DEPTH
    )


def setting(model, groups, key: str) -> dict[str, float]:
    """The value of `key` in the group of each parameter, by name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group[key] for group in groups for p in group["params"]}


def test_every_parameter_is_in_one_group(model):
    groups = parameter_groups(model, 0.05, layer_decay=0.7)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == sum(1 for _ in model.parameters())


def test_vectors_do_not_decay_though_stored_stacked(model):
    decay = setting(model, parameter_groups(model, 0.05), "weight_decay")
    assert decay["blocks.0.mixer.A_log"] == 0.05
    assert decay["blocks.0.mixer.in_proj.weight"] == 0.05
    assert decay["pos_embed"] == 0.05
    for name in ("mixer.D", "mixer.conv_bias", "mixer.dt_bias", "norm.weight"):
        assert decay[f"blocks.0.{name}"] == 0
    assert decay["head.bias"] == decay["norm.weight"] == 0


def test_further_names_can_be_exempt(model):
    decay = setting(model, parameter_groups(model, 0.05, no_decay=["pos_*"]), "weight_decay")
    assert decay["pos_embed"] == 0
    assert decay["head.weight"] == 0.05


def test_frozen_parameters_are_left_out(model):
    model.patch_embed.requires_grad_(False)
    names = setting(model, parameter_groups(model, 0.05), "lr_scale")
    assert "patch_embed.proj.weight" not in names
    assert "head.weight" in names


def test_layers_learn_at_their_own_rates_all_along_the_schedule(model):
    groups = parameter_groups(model, 0.05, layer_decay=0.5)
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    scheduler = Schedule(optimizer, cosine_by_epochs(1.0, 100, 10, start=0.0, end=0.0))
    for step, rate in ((5, 0.5), (10, 1.0), (55, 0.5), (100, 0.0)):
        scheduler.step_update(step)
        rates = setting(model, optimizer.param_groups, "lr")
        assert rates["head.weight"] == pytest.approx(rate)
        for block in range(DEPTH):
            expected = rate * 0.5 ** (DEPTH - block)
            assert rates[f"blocks.{block}.mixer.A_log"] == pytest.approx(expected)
            assert rates[f"blocks.{block}.mixer.D"] == pytest.approx(expected)
        assert rates["pos_embed"] == pytest.approx(rate * 0.5 ** (DEPTH + 1))


@pytest.mark.parametrize("name", ["fastvim_tiny_patch16_224", "vim_tiny_patch16_224"])
@pytest.mark.parametrize("depth", [3, 4, 24])
def test_pairs_of_blocks_share_a_rate_as_published(name, depth):
    model = timm.create_model(name, img_size=32, patch_size=8, embed_dim=16, depth=depth)
    groups = parameter_groups(model, 0.05, 0.65, blocks_per_decay=2, no_decay=["pos_embed"])
    scale, decay = (setting(model, groups, key) for key in ("lr_scale", "weight_decay"))

    n = depth + 1
    for parameter in scale:
        if parameter.startswith(("patch_embed.", "pos_embed", "cls_token")):
            assert scale[parameter] == 0.65 ** (n // 2 + n % 2)
        elif parameter.startswith("blocks."):
            g = int(parameter.split(".")[1]) + 1
            assert scale[parameter] == 0.65 ** ((n - g) // 2 + (n - g) % 2)
        else:
            assert parameter in {"norm.weight", "head.weight", "head.bias"}
            assert scale[parameter] == 1
    assert set(scale) == {parameter for parameter, _ in model.named_parameters()}
    assert decay["pos_embed"] == 0
    assert decay["patch_embed.proj.weight"] == 0.05


def optimizer_of(parameter: torch.Tensor, device: str, precision: str) -> torch.optim.AdamW:
    strategy = SimpleNamespace(root_device=torch.device(device))
    trainer = SimpleNamespace(strategy=strategy, precision=precision, is_global_zero=False)
    return make_adamw([{"params": [parameter]}], 0.1, (0.9, 0.99), trainer)


@pytest.mark.parametrize(
    ("device", "precision", "fused", "eps"),
    [
        ("cuda", "bf16-mixed", True, 1e-8),
        ("cuda", "32-true", True, 1e-8),
        ("cuda", "16-true", True, 1e-4),
        ("cuda", "16-mixed", None, 1e-8),  # the scale is taken off before the clipping
        ("cpu", "bf16-mixed", None, 1e-8),
    ],
)
def test_steps_on_a_gpu_are_fused(device, precision, fused, eps):
    group = optimizer_of(torch.zeros(3, requires_grad=True), device, precision).param_groups[0]
    assert group["fused"] is fused
    assert group["foreach"] is None
    assert group["eps"] == eps


def test_gradients_of_a_fused_step_can_be_clipped():
    parameter = torch.zeros(3, requires_grad=True)
    parameter.grad = torch.full((3,), 5.0)
    optimizer = optimizer_of(parameter, "cuda", "bf16-mixed")
    MixedPrecision("bf16-mixed", "cpu").clip_gradients(optimizer, 1.0)
    assert parameter.grad.norm() == pytest.approx(1.0)


@pytest.mark.parametrize("before", ["cpu", "cuda"])
@pytest.mark.parametrize("after", ["cpu", "cuda"])
def test_a_run_goes_on_with_the_other_kind_of_step(before, after):
    """The fused step of CPUs stands for that of GPUs."""

    def steps(parameter, optimizer, seeds) -> None:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            parameter.grad = torch.randn(5, generator=generator)
            optimizer.step()

    whole = torch.ones(5, requires_grad=True)
    steps(whole, optimizer_of(whole, after, "32-true"), range(5))
    parts = torch.ones(5, requires_grad=True)
    first = optimizer_of(parts, before, "32-true")
    steps(parts, first, range(3))
    second = optimizer_of(parts, after, "32-true")
    schedule = Schedule(second, lambda position: 0.1)
    second.load_state_dict(first.state_dict())
    schedule.restore(3)
    place_steps(second)
    assert bool(second.param_groups[0]["fused"]) == (after == "cuda")
    steps(parts, second, range(3, 5))
    torch.testing.assert_close(parts, whole, rtol=0 if before == after else 1e-6, atol=0)


def test_steps_from_lists_are_those_of_torch() -> None:
    """Bit for bit, also where a gradient is missing, a rate changes or a state is loaded.

    Rates are such as float32 has, in which a step from lists takes them.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (5,), (2, 2, 2), ())
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    parameters = [[each.clone().requires_grad_() for each in start] for _ in range(2)]
    ours, torchs = (
        of(
            [{"params": some[:2]}, {"params": some[2:], "weight_decay": 0.0, "lr": 0.0625}],
            lr=0.125,
            weight_decay=0.3,
            fused=True,
        )
        for of, some in zip((ListedAdamW, torch.optim.AdamW), parameters, strict=True)
    )
    listed = []
    for step in range(9):
        for number, pair in enumerate(zip(*parameters, strict=True)):
            gradient = torch.randn(shapes[number], generator=generator)
            for each in pair:
                each.grad = None if (step, number) in ((0, 1), (4, 3)) else gradient.clone()
        if step == 6:
            ours.load_state_dict(ours.state_dict())
            assert ours._lists is None
        for optimizer in (ours, torchs):
            optimizer.param_groups[1]["lr"] = 0.0625 * (1 - step / 16)
            assert optimizer.step(lambda: 7) == 7
        listed.append(ours._lists is not None)
        assert all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))
    assert listed == [False] + [True] * 8
    for one, other in zip(*parameters, strict=True):
        for key, value in ours.state[one].items():
            assert torch.equal(value, torchs.state[other][key])
