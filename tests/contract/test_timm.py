"""What timm expects of a model: once a family, with both engines."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from families import (
    CHANNEL_FAMILIES,
    CLASSES,
    DEPTH,
    DIM,
    IMAGE_FAMILIES,
    SIDE,
    create,
    gradients_of,
    has_channels,
    image,
    patch_of,
)
from timm.models import group_parameters
from torch import Tensor, nn

from fastvim import UserError, use_engine
from fastvim.weights import checkpoint_filter_fn

every_model = pytest.mark.parametrize("name", [*IMAGE_FAMILIES, *CHANNEL_FAMILIES])
image_models = pytest.mark.parametrize("name", IMAGE_FAMILIES)
# Where any model serves.
MODEL = next(iter(IMAGE_FAMILIES))


def per_cell(name: str) -> int:
    """Tokens of a cell of the grid."""
    return 3 if has_channels(name) else 1


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
        torch.testing.assert_close(model(x[1:]), logits[1:])  # whatever else is in the batch


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
        model.reset_classifier(7, global_pool="max")
        torch.testing.assert_close(model(x), model.head(tokens.amax(1)))
        model.reset_classifier(7, global_pool="avgmax")
        torch.testing.assert_close(model(x), model.head((tokens.mean(1) + tokens.amax(1)) / 2))
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
    model = create(MODEL).to(torch.float64)
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
def test_features_of_blocks(name, out_indices, blocks, engine):
    chosen = {} if out_indices is None else {"out_indices": out_indices}
    model = create(name, features_only=True, feature_cls="getter", **chosen)
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
    """The residual stream after each block, as a hook on the block receives it."""
    streams = []
    hooks = [
        block.register_forward_hook(lambda *seen: streams.append(seen[2])) for block in model.blocks
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return streams


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


def test_unknown_forms_of_intermediates():
    model, x = create(MODEL), image(MODEL)
    for option, value in (("output_fmt", "NHWC"), ("source", "hidden")):
        with pytest.raises(UserError, match=f"{option}.'{value}'"):
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
        # The last norm goes with the head, at the full learning rate.
        stem = {"patch_embed": 0, "pos_embed": 0, "cls_token": 0}
        assert layer == {**stem, **expected}.get(first, DEPTH + 1), parameter


@every_model
def test_no_weight_decay_names_parameters(name):
    model = create(name)
    shapes = {n: p.ndim for n, p in model.named_parameters()}
    assert model.no_weight_decay() <= set(shapes)
    # timm exempts what has one dimension; these have two, since the first one is the direction.
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
