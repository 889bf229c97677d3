"""Every recipe parses, builds its model and groups its parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fastvim.models import create_model
from fastvim.tasks import LinearProbe
from fastvim.tasks.dense_task import load_backbone
from fastvim.tasks.optim import parameter_groups
from fastvim.weights import Checkpoint, checkpoint_filter_fn
from fastvim.weights.table import ENTRIES
from fastvim_cli.train import TrainingCLI

ROOT = Path(__file__).parents[1]
RECIPES = sorted(f for d in ("recipes", "examples") for f in (ROOT / d).rglob("*.yaml"))
IMAGENET = [file for file in RECIPES if file.parent.name == "imagenet"]
PRETRAINING = [file for file in RECIPES if file.stem.startswith("pretrain_")]
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
    decaying, exempt = sorted(
        parameter_groups(task.model, task.weight_decay),
        key=lambda group: (-group["weight_decay"], -group["params"][0].ndim),
    )
    special = {"jumpcp": 0.04, "ade20k": 0.01}.get(recipe.parent.name, 0.05)
    assert decaying["weight_decay"] == (0 if isinstance(task, LinearProbe) else special)
    assert exempt["weight_decay"] == 0
    count = sum(parameter.requires_grad for parameter in task.model.parameters())
    assert len(decaying["params"]) + len(exempt["params"]) == count


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_recipe_says_how_to_run_it_and_what_to_expect(recipe):
    header = recipe.read_text().split("\nmodel:")[0]
    assert f"fastvim fit --config {recipe.relative_to(ROOT)}" in header
    assert "Published:" in header or "Expect" in header
    # The best checkpoint is chosen by the images of the test.
    tests = [line for line in header.splitlines() if "fastvim test --config" in line]
    assert all(line.endswith("--ckpt_path last") for line in tests)


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


@pytest.mark.parametrize("recipe", IMAGENET, ids=lambda file: file.stem)
def test_imagenet_recipes_are_the_published_one(recipe):
    cli = build(recipe)
    task, data = cli.model, cli.datamodule
    assert data.batch_size * 8 == 1024
    assert task.lr * 1024 / task.lr_batch == pytest.approx(2e-3)
    assert task.model_args["drop_path_rate"] == (0.4 if "base" in recipe.stem else 0.05)
    assert task.ema_decay == 0.9999
    assert cli.trainer.max_epochs == 300
    assert cli.config.trainer.precision == "bf16-mixed"


def global_batch(cli: TrainingCLI) -> int:
    """On eight GPUs."""
    return cli.datamodule.batch_size * 8 * cli.trainer.accumulate_grad_batches


@pytest.mark.parametrize("recipe", PRETRAINING, ids=lambda file: file.stem)
def test_pretraining_recipes_are_the_published_one(recipe):
    cli = build(recipe)
    task, trainer = cli.model, cli.trainer
    assert global_batch(cli) == 4096
    assert (task.lr, task.lr_batch, task.min_lr) == (1.5e-4, 256, 0)
    assert (task.warmup_epochs, trainer.max_epochs) == (40, 1600)
    assert (task.betas, task.ema_decay) == ((0.9, 0.95), None)
    assert task.model_args["mask_ratio"] == 0.75
    assert task.model_args["norm_pix_loss"]
    assert cli.config.data.init_args.scale == (0.2, 1.0)
    assert not cli.config.data.init_args.auto_augment
    assert trainer.gradient_clip_val is None


@pytest.mark.parametrize("recipe", FINETUNING, ids=lambda file: file.stem)
def test_finetuning_recipes_are_the_published_one(recipe):
    cli = build(recipe)
    task, trainer = cli.model, cli.trainer
    base = "base" in recipe.stem
    assert global_batch(cli) == 1024
    assert (task.lr, task.lr_batch, task.min_lr) == (5e-4 if base else 1e-3, 256, 1e-5)
    assert (task.warmup_epochs, trainer.max_epochs) == (5, 100 if base else 50)
    assert (task.layer_decay, task.blocks_per_decay) == (0.65 if base else 0.75, 2)
    assert task.no_decay == ["pos_embed"]
    assert task.model_args["drop_path_rate"] == 0.3
    assert task.model_args.get("pool_scale", 1) == (1 if "_vim_" in recipe.stem else 0.25)
    assert trainer.gradient_clip_val == (3.0 if "448" in recipe.stem else None)
    assert task.ema_decay is None
    # It starts from what the pre-training recipe of that size writes.
    source = recipe.stem.replace("finetune", "pretrain").removesuffix("_448")
    assert task.checkpoint == f"runs/mae/{source}/model.safetensors"
    pretraining = build(recipe.with_stem(source))
    assert pretraining.config.trainer.default_root_dir == f"runs/mae/{source}"


def test_probing_recipe_is_the_published_one():
    cli = build(ROOT / "recipes" / "mae" / "probe_fastvim_base.yaml")
    task = cli.model
    assert global_batch(cli) == 4096
    assert (task.lr, task.lr_batch, task.min_lr) == (0.1, 256, 0)
    assert (task.warmup_epochs, cli.trainer.max_epochs) == (10, 90)
    assert (task.momentum, task.weight_decay, task.trust_coefficient) == (0.9, 0, 0.001)
    assert task.model_args["pool_scale"] == 0.25


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
def test_cell_recipes_are_the_published_one(recipe):
    cli = build(recipe)
    task, data = cli.model, cli.datamodule
    assert global_batch(cli) == 256
    assert (task.lr, task.lr_batch, task.min_lr) == (1e-3, 256, 1e-6)
    assert (task.warmup_epochs, cli.trainer.max_epochs) == (10, 100)
    assert (task.weight_decay, task.weight_decay_end) == (0.04, 0.4)
    assert task.sample_channels
    assert (task.mixup_alpha, task.cutmix_alpha, task.label_smoothing) == (0, 0, 0)
    assert task.ema_decay is None
    pooling = {"pooling": "max"} if recipe.stem.endswith("max") else {}
    assert task.model_args == {"drop_path_rate": 0.05, **pooling}
    assert task.model_name == f"{recipe.stem.removesuffix('_max')}_224"
    assert (data.in_chans, data.label) == (8, "target")
    assert data.mean[0] == 4.0317
    assert data.std[-1] == 21.6395


@pytest.mark.parametrize("recipe", SEGMENTATION, ids=lambda file: file.stem)
def test_segmentation_recipes_are_the_published_one(recipe):
    cli = build(recipe)
    task, data, trainer = cli.model, cli.config.data.init_args, cli.trainer
    assert global_batch(cli) == 16
    assert (task.lr, task.lr_batch, task.min_lr, task.warmup_lr) == (6e-5, 16, 0, 1e-6)
    assert (task.warmup_steps, trainer.max_steps) == (1500, 160_000)
    assert (trainer.check_val_every_n_epoch, trainer.val_check_interval) == (None, 16_000)
    assert cli.config.trainer.sync_batchnorm
    assert task.model_args == {"img_size": 512, "norm": "layer", "drop_path_rate": 0.4}
    assert task.out_indices == (5, 11, 17, 23)
    assert (task.source, task.aux_weight, task.drop_rate) == ("mixer", 0.4, 0.1)
    assert (task.channels, task.aux_channels) == (512, 256)
    assert (task.window, task.stride) == (512, 341)
    assert (data.num_classes, data.reduce_zero_label, data.max_share) == (150, True, 0.75)
    assert (data.img_size, data.base_size, data.ratio) == (512, (2048, 512), (0.5, 2.0))


def test_there_are_segmentation_recipes():
    assert {f.stem for f in SEGMENTATION} == {"fastvim_tiny", "fastvim_small", "fastvim_base"}


@pytest.mark.parametrize("recipe", DETECTION, ids=lambda file: file.stem)
def test_detection_recipes_are_the_published_one(recipe):
    cli = build(recipe)
    task, data, trainer = cli.model, cli.config.data.init_args, cli.trainer
    assert global_batch(cli) == 64
    assert (task.lr, task.lr_batch, task.betas) == (1e-4, 64, (0.9, 0.999))
    assert (task.warmup_lr, task.warmup_steps) == (1e-7, 250)
    assert (task.weight_decay, task.layer_decay, task.blocks_per_decay) == (0.05, 0.7, 1)
    assert trainer.max_steps == 184_375
    assert [round(drop * trainer.max_steps) for drop in task.drops] == [163_889, 177_546]
    assert trainer.gradient_clip_val == 35
    assert task.model_args == {"img_size": 1024, "norm": "layer", "drop_path_rate": 0.4}
    assert (data.img_size, data.scale, data.hflip) == (1024, (0.1, 2.0), 0.5)
    assert task.source == "mixer"
    task.num_classes = 80
    with torch.device("meta"):
        task.configure_model()
    model = task.model
    assert (model.transform.least, model.heads.stages[0].detections_per_img) == (1024, 100)
    assert model.backbone.out_indices == [23]


def test_there_are_detection_recipes():
    names = {"fastvim_tiny", "fastvim_small", "fastvim_base", "vim_small"}
    assert {file.stem for file in DETECTION} == names
