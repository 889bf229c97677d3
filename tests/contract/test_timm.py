"""What timm asks of a model, of every registered model and through both code paths of each op."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.models import group_parameters
from torch import Tensor, nn

from fastvim import UserError, use_engine
from fastvim.models import checkpoint_filter_fn, to_published

CHANNELS = [*timm.list_models("fastchannelvim_*"), *timm.list_models("channelvim_*")]
NAMES = [*timm.list_models("fastvim_*"), *timm.list_models("vim_*"), *CHANNELS]
DEPTH, DIM, CLASSES, SIDE = 4, 32, 5, 3

every_model = pytest.mark.parametrize("name", NAMES)
image_models = pytest.mark.parametrize("name", [n for n in NAMES if n not in CHANNELS])


@pytest.fixture(params=["reference", "numba"])
def engine(request):
    with use_engine(request.param):
        yield request.param


def patch_of(name: str) -> int:
    return int(re.search(r"patch(\d+)", name)[1])


def per_cell(name: str) -> int:
    """Tokens of a cell of the grid."""
    return 3 if name in CHANNELS else 1


def create(name: str, side: int = SIDE, **options) -> nn.Module:
    """The registered constructor, in a small configuration: a grid of `side` x `side` patches."""
    torch.manual_seed(0)
    small = {"img_size": side * patch_of(name), "embed_dim": DIM, "depth": DEPTH, "in_chans": 3}
    return timm.create_model(name, **{**small, "num_classes": CLASSES, **options}).eval()


def image(name: str, rows: float = SIDE, columns: float | None = None, in_chans: int = 3) -> Tensor:
    """Two images of so many patches, whole or not, down and across."""
    patch = patch_of(name)
    shape = [int(patch * count) for count in (rows, rows if columns is None else columns)]
    return torch.randn(2, in_chans, *shape, generator=torch.Generator().manual_seed(1))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# Shapes.


@every_model
def test_forward(name, engine):
    model, x = create(name), image(name)
    with torch.no_grad():
        logits = model(x)
        features = model.forward_features(x)
        assert logits.shape == (2, CLASSES)
        assert logits.isfinite().all()
        assert not torch.allclose(logits[0], logits[1])
        tokens = SIDE**2 * per_cell(name) + (model.cls_token is not None)
        assert features.shape == (2, tokens, DIM)
        assert torch.equal(model.forward_head(features), logits)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        assert torch.equal(model.get_classifier()(pooled), logits)
        assert torch.equal(model(x), logits)  # the same every time
        torch.testing.assert_close(model(x[1:]), logits[1:])  # whatever shares the batch


@every_model
def test_both_engines_agree(name):
    model, x = create(name), image(name)
    runs = []
    for engine in ("reference", "numba"):
        model.zero_grad()
        with use_engine(engine):
            logits = model(x)
            logits.square().sum().backward()
        runs.append({"logits": logits.detach(), **gradients_of(model)})
    for key, expected in runs[0].items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(runs[1][key], expected, atol=1e-5 * scale, rtol=1e-4)


@every_model
def test_any_size_of_image(name, engine):
    model = create(name)
    for rows, columns in ((1, 1), (2, 5), (4, 1.5), (2.3, 3.7)):
        x = image(name, rows, columns)
        with torch.no_grad():
            logits, maps = model(x), model.forward_intermediates(x, 1)[1]
        assert logits.shape == (2, CLASSES)
        assert logits.isfinite().all()
        assert maps[0].shape == (2, DIM, math.ceil(rows), math.ceil(columns))


@every_model
def test_another_size_is_the_model_with_its_positions_resized(name, engine):
    small = create(name)
    for rows, columns in ((5, 5), (2, 5)):
        large = create(name, img_size=(rows * patch_of(name), columns * patch_of(name)))
        large.load_state_dict(checkpoint_filter_fn(small.state_dict(), large))
        with torch.no_grad():
            for x in (image(name, rows, columns), image(name, rows, columns - 0.5)):
                torch.testing.assert_close(small(x), large(x))


# The classifier.


@every_model
def test_no_classes(name, engine):
    x = image(name)
    model, whole = create(name, num_classes=0), create(name)
    assert isinstance(model.get_classifier(), nn.Identity)
    model.load_state_dict({k: v for k, v in whole.state_dict().items() if "head" not in k})
    with torch.no_grad():
        expected = whole.forward_head(whole.forward_features(x), pre_logits=True)
        assert torch.equal(model(x), expected)
        whole.reset_classifier(0)
        assert torch.equal(whole(x), expected)
        assert whole.num_classes == 0


@every_model
def test_reset_classifier(name):
    model, x = create(name), image(name, 2, 3)
    model.reset_classifier(11)
    assert model.num_classes == model.get_classifier().out_features == 11
    assert model(x).shape == (2, 11)
    read_out = model.global_pool
    model.reset_classifier(7, global_pool="avg")
    with torch.no_grad():
        tokens = model.forward_features(x)
        torch.testing.assert_close(model(x), model.head(tokens.mean(1)))
        model.reset_classifier(7, global_pool="last")
        torch.testing.assert_close(model(x), model.head(tokens[:, -1]))
        model.reset_classifier(7, global_pool="max_logit")
        torch.testing.assert_close(model(x), model.head(tokens).amax(1))
        model.reset_classifier(0, global_pool="")
        assert torch.equal(model(x), tokens)
    if read_out == "token":
        model.reset_classifier(7, global_pool="token")
        torch.testing.assert_close(model(x), model.head(tokens[:, 3 * per_cell(name)]))
    else:
        with pytest.raises(UserError, match="class_token"):
            model.reset_classifier(7, global_pool="token")


def test_a_new_classifier_is_where_the_model_is():
    model = create(NAMES[0]).to(torch.float64)
    model.reset_classifier(3)
    assert model.head.weight.dtype == torch.float64


@image_models
@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_channels(name, in_chans, engine):
    model = create(name, in_chans=in_chans)
    assert model(image(name, in_chans=in_chans)).shape == (2, CLASSES)
    with pytest.raises(UserError, match=f"{in_chans}"):
        model(image(name, in_chans=3))


# Features.


@every_model
@pytest.mark.parametrize(
    ("out_indices", "blocks"),
    [(None, [1, 2, 3]), (2, [2, 3]), ((0, 2), [0, 2]), ((1,), [1]), ((-2, -1), [2, 3])],
)
def test_features_only(name, out_indices, blocks, engine):
    chosen = {} if out_indices is None else {"out_indices": out_indices}
    model = create(name, features_only=True, **chosen)
    x = image(name, 2, 4)
    with torch.no_grad():
        maps = model(x)
        expected = create(name).forward_intermediates(x, blocks, intermediates_only=True)
    assert model.feature_info.channels() == [m.shape[1] for m in maps] == [DIM] * len(blocks)
    assert model.feature_info.module_name() == [f"blocks.{i}" for i in blocks]
    for reduction, actual, whole in zip(
        model.feature_info.reduction(), maps, expected, strict=True
    ):
        assert actual.shape == (2, DIM, *(s // reduction for s in x.shape[2:]))
        assert torch.equal(actual, whole)
    names = [n for n, _ in model.named_parameters()]
    assert not any("head." in n or f"blocks.{max(blocks) + 1}." in n for n in names)


def residual_streams(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What each block leaves in the stream, caught on its way in to the next norm."""
    streams = []
    norms = [*(block.norm for block in model.blocks), model.norm]
    hooks = [n.register_forward_hook(lambda *a: streams.append(a[2][1])) for n in norms]
    model(x)
    for hook in hooks:
        hook.remove()
    return streams[1:]


@every_model
@pytest.mark.parametrize(
    ("indices", "blocks"), [(None, [0, 1, 2, 3]), (2, [2, 3]), ([0, 2], [0, 2]), ([-1, 1], [1, 3])]
)
def test_intermediates(name, indices, blocks, engine):
    model, x = create(name), image(name, 2, 3)
    with torch.no_grad():
        streams = residual_streams(model, x)
        final, maps = model.forward_intermediates(x, indices)
        only = model.forward_intermediates(x, indices, intermediates_only=True)
        _, lists = model.forward_intermediates(x, indices, output_fmt="NLC")
        _, pairs = model.forward_intermediates(x, indices, return_prefix_tokens=True)
        _, normed = model.forward_intermediates(x, indices, norm=True, output_fmt="NLC")
        assert torch.equal(final, model.forward_features(x))
    assert len(maps) == len(only) == len(lists) == len(pairs) == len(blocks)
    count = 6 * per_cell(name)
    middle = count // 2 if model.cls_token is not None else None
    for i, number in enumerate(blocks):
        tokens = streams[number]
        cells = [j for j in range(tokens.shape[1]) if j != middle]
        assert len(cells) == count
        assert torch.equal(lists[i], tokens[:, cells])
        assert maps[i].shape == (2, DIM, 2, 3)
        means = lists[i].unflatten(1, (6, -1)).mean(2)
        torch.testing.assert_close(maps[i].flatten(2).mT, means)
        assert torch.equal(only[i], maps[i])
        assert torch.equal(pairs[i][0], maps[i])
        prefix = tokens[:, middle : middle + 1] if middle else tokens[:, :0]
        assert torch.equal(pairs[i][1], prefix)
        weight = model.norm.weight
        torch.testing.assert_close(normed[i], F.rms_norm(lists[i], (DIM,), weight, 1e-5))


@every_model
def test_intermediates_that_stop_early(name):
    model, x = create(name), image(name)
    with torch.no_grad():
        whole = model.forward_intermediates(x, [0, 2], intermediates_only=True)
        ran = []
        for block in model.blocks:
            block.register_forward_hook(lambda *_: ran.append(1))
        final, early = model.forward_intermediates(x, [0, 2], stop_early=True)
        assert len(ran) == 3
        assert model.prune_intermediate_layers([0, 2]) == [0, 2]
        assert len(model.blocks) == 3
        assert torch.equal(model.forward_features(x), final)
        assert isinstance(model.head, nn.Identity)
        stream = residual_streams(model, x)[2]
        model.prune_intermediate_layers(3, prune_norm=True)
        assert torch.equal(model.forward_features(x), stream)
    for a, b in zip(early, whole, strict=True):
        assert torch.equal(a, b)


def test_intermediates_of_no_known_form():
    model, x = create(NAMES[0]), image(NAMES[0])
    for option, value in (("output_fmt", "NHWC"), ("source", "hidden")):
        with pytest.raises(UserError, match=f"{option}='{value}'"):
            model.forward_intermediates(x, **{option: value})


# Training.


@every_model
def test_groups_of_parameters(name):
    model = create(name)
    layer_of = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(layer_of) == {n for n, _ in model.named_parameters()}
    for parameter, layer in layer_of.items():
        first, _, rest = parameter.partition(".")
        expected = {"blocks": 1 + int(rest.split(".")[0])} if first == "blocks" else {}
        # The last norm goes with the head, which trains at the full rate of the recipes.
        stem = {"patch_embed": 0, "pos_embed": 0, "cls_token": 0}
        assert layer == {**stem, **expected}.get(first, DEPTH + 1), parameter


@every_model
def test_no_weight_decay_names_parameters(name):
    model = create(name)
    shapes = {n: p.ndim for n, p in model.named_parameters()}
    assert model.no_weight_decay() <= set(shapes)
    # By name or by having one dimension: one per direction, so that they have two here.
    spared = ("conv_bias", "dt_bias", "D")
    for parameter, dims in shapes.items():
        named = parameter.rsplit(".", 1)[-1] in spared
        assert (parameter in model.no_weight_decay()) == named
        assert not named or dims == 2


@every_model
def test_checkpointed_gradients_are_the_same(name, engine):
    model, x = (
        create(name, drop_path_rate=0.5, pos_drop_rate=0.2, drop_rate=0.2).train(),
        image(name),
    )
    gradients, forwards = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        calls = []
        hook = model.blocks[1].mixer.register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        torch.manual_seed(3)
        model(x).square().sum().backward()
        hook.remove()
        gradients.append(gradients_of(model))
        forwards.append(len(calls))
    assert forwards == [1, 2]  # recomputed in the backward pass
    for key, expected in gradients[0].items():
        assert torch.equal(gradients[1][key], expected), key


@every_model
@pytest.mark.parametrize("option", ["drop_rate", "pos_drop_rate", "drop_path_rate"])
def test_training_drops_and_evaluation_does_not(name, option):
    model, x = create(name, **{option: 0.5}), image(name)
    with torch.no_grad():
        assert torch.equal(model(x), create(name)(x))
        assert not torch.equal(model.train()(x), model(x))


# Configuration and weights.


@every_model
def test_default_cfg(name):
    cfg = timm.get_pretrained_cfg(name)
    with torch.device("meta"):
        model = timm.create_model(name)
    channels, height, width = cfg.input_size
    assert channels == len(cfg.mean) == len(cfg.std) == (8 if name in CHANNELS else 3)
    assert model.patch_embed.grid_size(height, width) == model.grid_size
    assert f"_{height}" in name
    if name in CHANNELS:
        assert cfg.first_conv is None  # whose weights timm would fit to other channels
    else:
        assert isinstance(model.get_submodule(cfg.first_conv), nn.Conv2d)
    assert model.get_submodule(cfg.classifier) is model.get_classifier()
    assert model.get_classifier().out_features == cfg.num_classes
    assert not cfg.fixed_input_size
    data = resolve_model_data_config(model)
    crop = 1.0 if name in CHANNELS else 0.875
    assert (data["input_size"], data["crop_pct"]) == (cfg.input_size, crop)
    assert data["interpolation"] == "bicubic"


def by_hand(model: nn.Module, side: int) -> Tensor:
    """The position embedding on another square grid; the class token's stands in the middle."""
    vectors = list(model.pos_embed.detach()[0])
    token = vectors.pop(SIDE**2 // 2) if model.positions_class else None
    grid = torch.stack(vectors).reshape(1, SIDE, SIDE, DIM).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    vectors = list(resized[0].flatten(1).T)
    if token is not None:
        vectors.insert(len(vectors) // 2, token)
    return torch.stack(vectors)[None]


@every_model
@pytest.mark.parametrize("side", [3, 2, 6])
def test_checkpoint_filter(name, side):
    source, target = create(name), create(name, side=side)
    expected = {**source.state_dict(), "pos_embed": by_hand(source, side)}
    for weights in (source.state_dict(), to_published(source.state_dict())):
        filtered = checkpoint_filter_fn(weights, target)
        assert filtered.keys() == target.state_dict().keys()
        for key, tensor in filtered.items():
            torch.testing.assert_close(tensor, expected[key], msg=key)


def test_checkpoint_filter_undoes_the_published_column_order():
    model = create("fastvim_tiny_patch16_224", scan_path="column")
    grid = model.pos_embed.detach().reshape(SIDE, SIDE, DIM)
    published = to_published(model.state_dict())
    published["pos_embed"] = grid.transpose(0, 1).reshape(1, -1, DIM)
    filtered = checkpoint_filter_fn(published, model)
    assert torch.equal(filtered["pos_embed"], model.pos_embed)


@every_model
def test_pretrained_weights_are_fitted_by_timm(name, tmp_path):
    source = create(name)
    torch.save(to_published(source.state_dict()), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": CLASSES}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    same = create(name, **options)
    for key, tensor in source.state_dict().items():
        assert torch.equal(same.state_dict()[key], tensor), key
    other = create(name, side=4, num_classes=7, **options)
    assert other(image(name, 4)).shape == (2, 7)


@image_models
def test_pretrained_weights_are_fitted_to_other_channels(name, tmp_path):
    source = create(name)
    torch.save(to_published(source.state_dict()), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": CLASSES}
    other = create(name, in_chans=1, pretrained=True, pretrained_cfg_overlay=overlay)
    weight = source.patch_embed.proj.weight
    torch.testing.assert_close(other.patch_embed.proj.weight, weight.sum(1, keepdim=True))


@every_model
def test_copies_give_the_same_logits(name):
    model, x = create(name), image(name)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    loaded = create(name)
    nn.init.zeros_(loaded.blocks[0].mixer.A_log)
    loaded.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    with torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
            assert torch.equal(twin(x), model(x))
            assert twin.default_cfg == model.default_cfg


# Precision.


@every_model
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(name, dtype, engine):
    model, x = create(name), image(name)
    with torch.no_grad():
        expected = model(x)
        _, maps = model.forward_intermediates(x)
        model.to(dtype)
        logits = model(x.to(dtype))
        _, halves = model.forward_intermediates(x.to(dtype), norm=False)
    assert logits.dtype == dtype
    # Each of the blocks rounds its input, its projections and its output.
    bound = 4 * DEPTH**0.5 * torch.finfo(dtype).eps
    for actual, exact in zip([logits, *halves], [expected, *maps], strict=True):
        assert float((actual - exact).norm() / exact.norm()) < bound


@every_model
def test_autocast(name, engine):
    model, x = create(name, drop_path_rate=0.1), image(name)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
    error = float((logits - expected).norm() / expected.norm())
    assert 0 < error < 8 * torch.finfo(torch.bfloat16).eps
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(x).float().square().sum()
    loss.backward()
    for key, gradient in gradients_of(model).items():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all(), key
        assert gradient.any(), key


def test_a_model_on_the_meta_device_gives_shapes():
    model, x = create(NAMES[0]).to("meta"), image(NAMES[0]).to("meta")
    assert model(x).shape == (2, CLASSES)
