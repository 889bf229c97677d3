"""Hooks on the modules that a user names, and graphs of `torch.fx`: the model, in tensors."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from families import (
    CHANNEL_FAMILIES,
    DEPTH,
    DIM,
    IMAGE_FAMILIES,
    MASKED_FAMILIES,
    SIDE,
    create,
    gradients_of,
    image,
)
from torch import Tensor, nn
from torch.nn.utils import prune

from fastvim import UserError
from fastvim.models import FeatureMaps

classifiers = pytest.mark.parametrize("name", [*IMAGE_FAMILIES, *CHANNEL_FAMILIES])
every_model = pytest.mark.parametrize(
    "name", [*IMAGE_FAMILIES, *CHANNEL_FAMILIES, *MASKED_FAMILIES]
)
MODEL = next(iter(IMAGE_FAMILIES))


def output(model: nn.Module, x: Tensor) -> Tensor:
    """Logits, or an autoencoder's loss under one mask."""
    torch.manual_seed(3)
    out = model(x)
    return out.loss if hasattr(out, "loss") else out


def with_weights(model: nn.Module) -> list[str]:
    """Names of the modules that have weights, their own or those of their parts."""
    return [name for name, module in model.named_modules() if name and [*module.parameters()]]


@every_model
def test_every_module_is_called_where_it_has_a_hook_and_gives_a_tensor(name):
    """Without a change of logits and gradients, in evaluation and in training."""
    lists = ("blocks", "encoder", "encoder.blocks", "decoder_blocks")
    for options in ({}, {"drop_path_rate": 0.5}):
        model, x = create(name, **options).train(bool(options)), image(name)
        expected = output(model, x)
        expected.square().sum().backward()
        gradients = gradients_of(model)
        model.zero_grad()
        seen = {}
        for path in with_weights(model):
            model.get_submodule(path).register_forward_hook(
                lambda *a, path=path, seen=seen: seen.update({path: a[2]})
            )
        hooked = output(model, x)
        assert set(with_weights(model)) - set(seen) <= set(lists)
        assert all(isinstance(out, Tensor) for out in seen.values())
        assert all(out.requires_grad for out in seen.values())
        torch.testing.assert_close(hooked, expected)
        hooked.square().sum().backward()
        torch.testing.assert_close(gradients_of(model), gradients)


@classifiers
def test_a_hook_on_a_block_sees_the_residual_stream(name, engine):
    """Of a model in half precision in float32; its replacement goes on to the next block."""
    model, x = create(name).to(torch.bfloat16), image(name).to(torch.bfloat16)
    seen = {}
    model.blocks[1].register_forward_hook(lambda *a: seen.update(block=a[2]))
    model.blocks[2].norm.register_forward_hook(lambda *a: seen.update(into=a[1][0], normed=a[2]))
    with torch.no_grad():
        model(x)
    tokens = SIDE**2 * (3 if name in CHANNEL_FAMILIES else 1) + (model.cls_token is not None)
    assert seen["block"].shape == (2, tokens, DIM)
    assert torch.equal(seen["block"], seen["into"])
    assert seen["block"].dtype == torch.float32
    model.blocks[1].register_forward_hook(lambda *a: torch.zeros_like(a[2]))
    with torch.no_grad():
        model(x)
    assert not seen["into"].any()


@pytest.mark.parametrize("path", ["blocks.1", "norm", "blocks.0.mixer.norm", "patch_embed.proj"])
def test_hooks_on_the_backward_pass(path):
    """The gradient of what a hook of the forward pass sees."""
    model, x = create(MODEL), image(MODEL)
    layer, seen = model.get_submodule(path), []
    layer.register_full_backward_hook(lambda module, into, out: seen.append(out[0]))
    layer.register_forward_hook(lambda *a: (a[2].retain_grad(), seen.append(a[2]))[1])
    model(x).square().sum().backward()
    assert seen[0].grad.any()
    assert torch.equal(seen[0].grad, seen[1])


def test_a_hook_takes_part_in_recomputed_blocks():
    model, x = create(MODEL).train(), image(MODEL)
    model(x).sum().backward()
    expected = gradients_of(model)
    model.zero_grad()
    model.set_grad_checkpointing()
    model.blocks[1].register_forward_hook(lambda *a: a[2] * 1)
    model(x).sum().backward()
    torch.testing.assert_close(gradients_of(model), expected)


def test_the_maps_of_mixers_do_not_change_under_hooks():
    """The published dense backbones read the mixers' outputs, before they join the stream."""
    maps, x = FeatureMaps(create(MODEL, drop_path_rate=0.5), [0, 3]).train(), image(MODEL)
    torch.manual_seed(0)
    expected = maps(x)
    for block in maps.backbone.blocks:
        block.register_forward_hook(lambda *_: None)
    torch.manual_seed(0)
    assert all(map(torch.equal, maps(x), expected))


@pytest.mark.parametrize(
    "path", ["patch_embed.proj", "blocks.0.mixer.norm", "blocks.1.norm", "norm"]
)
def test_what_replaces_a_layer_is_called(path):
    """As adapters do, which wrap a layer and keep its weights, or what leaves a norm out."""

    class Doubled(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.layer(x)

    model, x = create(MODEL), image(MODEL)
    owner, child = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    layer = model.get_submodule(path)
    with torch.no_grad():
        hook = layer.register_forward_hook(lambda *a: 2 * a[2])
        expected = model(x)
        hook.remove()
        assert not torch.allclose(model(x), expected)
        setattr(owner, child, Doubled(layer))
        torch.testing.assert_close(model(x), expected)
        if "norm" in path:
            setattr(owner, child, nn.Identity())
            assert model(x).isfinite().all()


@pytest.mark.parametrize("path", ["patch_embed.proj", "blocks.0.mixer.norm"])
def test_pruned_weights_are_trained(path):
    """PyTorch's pruning computes the weight anew in a hook before every call."""
    model, x = create(MODEL).train(), image(MODEL)
    layer = model.get_submodule(path)
    prune.random_unstructured(layer, "weight", amount=0.5)
    with torch.no_grad():
        layer.weight_orig.mul_(3)
    model(x).sum().backward()
    assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)
    assert layer.weight_orig.grad.any()
    assert not layer.weight_orig.grad[layer.weight_mask == 0].any()


def test_hooks_are_a_part_of_the_compiled_graph():
    """Of one graph, as without them."""
    model, x = create(MODEL, depth=2), image(MODEL)
    for path in ("patch_embed.proj", "blocks.0", "blocks.1.mixer.norm", "norm"):
        model.get_submodule(path).register_forward_hook(lambda *a: 2 * a[2])
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)


@every_model
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_graphs_of_fx_are_the_model(name, training):
    """As timm traces them, for every size of images, with the model's gradients."""
    model = create(name, drop_path_rate=0.5).train(training)
    last = timm.models.get_graph_node_names(model)[0 if training else 1][-1]
    graph = timm.models.create_feature_extractor(model, [last]).train(training)
    for rows, columns in ((SIDE, SIDE), (2, 4.5)):
        x = image(name, rows, columns)
        expected = output(model, x)
        torch.manual_seed(3)
        (actual,) = graph(x).values()
        if training:  # with the samples dropped from the stream after they have joined it
            torch.testing.assert_close(actual, expected)
        else:
            assert torch.equal(actual, expected)
    expected.square().sum().backward()
    gradients = gradients_of(model)
    model.zero_grad()
    actual.square().sum().backward()
    for key, gradient in gradients_of(graph).items():
        torch.testing.assert_close(gradient, gradients[key])


@classifiers
def test_feature_extractors_name_the_modules(name):
    """torchvision's, which knows nothing of this library."""
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = create(name)
    paths = ["patch_embed.proj", "blocks.0.norm", "blocks.1.mixer"]
    paths += [f"blocks.{i}" for i in range(DEPTH)] + ["norm", "head"]
    extractor = feature_extraction.create_feature_extractor(copy.deepcopy(model), paths)
    seen = {}
    for path in paths:
        model.get_submodule(path).register_forward_hook(
            lambda *a, path=path: seen.update({path: a[2]})
        )
    for x in (image(name), image(name, 2, 4.5)):
        with torch.no_grad():
            model(x)
            torch.testing.assert_close(extractor(x), {path: seen[path] for path in paths})


@every_model
def test_scripting_is_refused_in_one_line(name):
    with pytest.raises(UserError, match=r"torch\.jit\.trace") as caught:
        torch.jit.script(create(name))
    assert "\n" not in str(caught.value)
