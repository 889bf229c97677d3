"""Every recipe parses and builds its model, which is the one that was published."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastvim.models import create_model
from fastvim.tasks.dense_task import load_backbone
from fastvim.weights import Checkpoint, checkpoint_filter_fn
from fastvim.weights.table import ENTRIES
from fastvim_cli.train import TrainingCLI

ROOT = Path(__file__).parents[1]
RECIPES = sorted(f for d in ("recipes", "examples") for f in (ROOT / d).rglob("*.yaml"))
SEGMENTATION = [file for file in RECIPES if file.parent.name == "ade20k"]
DETECTION = [file for file in RECIPES if file.parent.name == "coco"]
CELLS = [file for file in RECIPES if file.parent.name == "jumpcp"]
FINETUNING = [file for file in RECIPES if file.stem.startswith("finetune_")]


def build(recipe: Path, command: str = "fit", options: Sequence[str] = ()) -> TrainingCLI:
    return TrainingCLI(
        command,
        [f"--config={recipe}", "--data.root=images", "--trainer.accelerator=cpu", *options],
    )


def test_there_are_recipes():
    assert {file.stem for file in RECIPES} >= {
        "quickstart",
        "fastvim_tiny",
        "fastvim_small",
        "fastvim_base",
        "vim_base",
        "pretrain_fastvim_base",
        "pretrain_fastvim_large",
        "pretrain_fastvim_huge",
        "pretrain_vim_base",
        "pretrain_vim_large",
        "finetune_fastvim_base",
        "finetune_fastvim_large",
        "finetune_fastvim_huge",
        "finetune_fastvim_huge_448",
        "finetune_vim_base",
        "finetune_vim_large",
        "probe_fastvim_base",
        "pretrain",
        "finetune",
        "probe",
        "fastchannelvim_small_patch16",
        "fastchannelvim_small_patch16_max",
        "fastchannelvim_small_patch8",
        "fastchannelvim_small_patch8_max",
        "channelvim_small_patch16",
        "channelvim_small_patch8",
        "landsat",
        "semantic",
        "instances",
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_recipe_builds(recipe):
    cli = build(recipe)
    task = cli.model
    task.num_classes = 10  # else the data's
    task.checkpoint = None  # another recipe writes it
    with torch.device("meta"):
        task.configure_model()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_recipe_says_how_to_run_it_and_what_to_expect(recipe):
    header = recipe.read_text().split("\nmodel:")[0]
    assert f"fastvim fit --config {recipe.relative_to(ROOT)}" in header
    assert "Published:" in header or "Expect" in header
    # The best checkpoint is chosen by the images of the test.
    tests = [line for line in header.splitlines() if "fastvim test --config" in line]
    assert all(line.endswith("--ckpt_path last") for line in tests)


@pytest.mark.parametrize(
    "recipe",
    sorted((ROOT / "recipes").glob("*/*.yaml")),
    ids=lambda file: f"{file.parts[-2]}/{file.stem}",
)
def test_recipe_says_once_in_what_a_run_differs(recipe):
    header = recipe.read_text().split("\nmodel:")[0].replace("\n#", "")
    assert header.count("What differs in a run here") == header.count("published: 32 bits") == 1
    assert header.count("--trainer.precision 32-true") == header.count("random numbers") == 1
    assert ("masks," in header) == ("pretrain" in recipe.stem)
    assert "images a step" in header or "The global batch is" in header


@pytest.mark.parametrize("entry", [e for e in ENTRIES.values() if e.recipe], ids=lambda e: e.name)
def test_recipe_names_what_was_published_for_it(entry):
    header = (ROOT / "recipes" / f"{entry.recipe}.yaml").read_text().split("\nmodel:")[0]
    command = "fastvim test" if entry.number else "fastvim reconstruct --model"
    assert f"#   {command} {entry.name} " in header
    assert all(f"{number} " in header for number in entry.number.values())


@pytest.mark.parametrize("recipe", [*SEGMENTATION, *DETECTION], ids=lambda file: file.stem)
def test_dense_recipe_starts_from_the_classifier_that_it_names(recipe):
    """As its header says; only names and shapes are compared."""
    line = next(x for x in recipe.read_text().splitlines() if x.startswith("#   fastvim fit"))
    options = line.split("--data.root")[1].split()[1:]
    task = build(recipe, options=options).model
    entry = ENTRIES[task.checkpoint]
    assert entry.backbone == task.model_name
    with torch.device("meta"):
        classifier = create_model(entry.backbone, **entry.model_args)
        load_backbone(task.create_network(), Checkpoint(Path("x"), classifier.state_dict(), "EMA"))


@pytest.mark.parametrize(
    "name", ["finetune_fastvim_base", "finetune_vim_base", "probe_fastvim_base"]
)
def test_recipe_names_the_pretraining_that_it_starts_from(name):
    recipe = ROOT / "recipes" / "mae" / f"{name}.yaml"
    header = recipe.read_text().split("\nmodel:")[0]
    published = re.search(r"--model.checkpoint (mae_\S+\.in1k)", header)[1]
    assert ENTRIES[published].backbone == f"mae_{build(recipe).model.model_name}"


@pytest.mark.parametrize("recipe", FINETUNING, ids=lambda file: file.stem)
def test_finetuning_starts_from_what_the_pretraining_of_that_size_writes(recipe):
    source = recipe.stem.replace("finetune", "pretrain").removesuffix("_448")
    assert build(recipe).model.checkpoint == f"runs/mae/{source}/model.safetensors"
    pretraining = build(recipe.with_stem(source))
    assert pretraining.config.trainer.default_root_dir == f"runs/mae/{source}"


def test_the_recipes_of_the_digits_fit_together():
    pretraining = build(ROOT / "examples" / "digits" / "pretrain.yaml")
    finetuning = build(ROOT / "examples" / "digits" / "finetune.yaml")
    probe = build(ROOT / "examples" / "digits" / "probe.yaml")
    source = finetuning.model.checkpoint
    assert source == f"{pretraining.config.trainer.default_root_dir}/model.safetensors"
    assert probe.model.checkpoint == source
    assert probe.model.model_args == finetuning.model.model_args
    assert vars(probe.config.data.init_args) == vars(pretraining.config.data.init_args)
    for cli in (pretraining, finetuning):
        cli.model.num_classes = 10
        cli.model.checkpoint = None
        cli.model.configure_model()
    weights = checkpoint_filter_fn(pretraining.model.model.state_dict(), finetuning.model.model)
    own = finetuning.model.model.state_dict()
    assert own.keys() - weights.keys() == {"head.weight", "head.bias"}
    assert all(weights[name].shape == own[name].shape for name in weights)
    assert finetuning.model.model_args["pool_scale"] == 1 - pretraining.model.model.mask_ratio
    # The images are prepared alike, and the labels are few.
    settings = (cli.config.data.init_args for cli in (pretraining, finetuning))
    first, second = ({**vars(setting)} for setting in settings)
    differing = {name for name in first if first[name] != second[name]}
    assert differing == {"train_images", "batch_size"}


@pytest.mark.parametrize("recipe", CELLS, ids=lambda file: file.stem)
def test_cell_recipes_are_of_the_model_that_they_are_named_after(recipe):
    task = build(recipe).model
    assert task.sample_channels
    pooling = {"pooling": "max"} if recipe.stem.endswith("max") else {}
    assert task.model_args == {"drop_path_rate": 0.05, **pooling}
    assert task.model_name == f"{recipe.stem.removesuffix('_max')}_224"


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=lambda entry: entry.name)
def test_recipes_build_what_was_published(entry):
    """The options of the published weights, and the sizes of their heads."""
    if not entry.recipe:
        pytest.skip("the original Vim's recipes are not here")
    cli = build(ROOT / "recipes" / f"{entry.recipe}.yaml")
    task = cli.model
    assert task.model_name == entry.backbone
    trained = {"drop_path_rate", "img_size", "mask_ratio", "norm_pix_loss"}
    trained |= {"decoder_embed_dim", "decoder_depth"}  # as the name implies
    options = {name: task.model_args[name] for name in task.model_args.keys() - trained}
    assert options == {n: v for n, v in entry.model_args.items() if n not in trained}
    for head, sizes in entry.head.items():
        task.num_classes = sizes["num_classes"]
        with torch.device("meta"):
            task._trainer = cli.trainer
            cli.trainer.datamodule = SimpleNamespace(class_names=[], category_ids=[], frame="exif")
            task.configure_model()
        found = task.exported_metadata()[head]
        assert {name: found[name] for name in sizes} == {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in sizes.items()
        }


def test_dense_recipes_validate_ten_times():
    for recipe in (*SEGMENTATION, *DETECTION):
        trainer = build(recipe).trainer
        assert trainer.check_val_every_n_epoch is None
        assert trainer.val_check_interval == trainer.max_steps // 10
    assert all(build(recipe).config.trainer.sync_batchnorm for recipe in SEGMENTATION)
