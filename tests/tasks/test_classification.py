"""The classification task in Lightning's hands: rate, averages, losses that are not finite."""

from __future__ import annotations

import csv
import io
import json
import math

import lightning as L
import pytest
import torch
from harness import MODEL_ARGS, ONE_EPOCH, last, trainer
from rich.console import Console
from safetensors.torch import load_file

from fastvim.data.images import ImageData
from fastvim.errors import UserError
from fastvim.tasks import Classification
from fastvim.tasks.callbacks.run_log import RunLog
from fastvim_cli import main
from fastvim_cli.train import TrainingCLI


def task(**settings) -> Classification:
    defaults = {"model_args": MODEL_ARGS, "warmup_epochs": 0}
    return Classification("fastvim_tiny_patch16_224", **{**defaults, **settings})


def test_the_rate_scales_with_the_true_global_batch(tmp_path, data):
    rates = []

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    classifier = task(lr=0.512, lr_batch=512, min_lr=0.0)
    trainer(tmp_path, Rates(), accumulate_grad_batches=3).fit(classifier, datamodule=data)
    assert classifier.global_batch == 24
    assert classifier.peak_lr == pytest.approx(0.024)
    # 12 batches are 4 steps; the rate moves after each of them.
    expected = [0.024 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)]
    assert rates == pytest.approx([expected[(batch + 1) // 3] for batch in range(12)])


def test_the_weight_decay_follows_a_cosine(tmp_path, data):
    decays = []

    class Decays(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            decays.append(sorted({g["weight_decay"] for g in trainer.optimizers[0].param_groups}))

    classifier = task(weight_decay=0.04, weight_decay_end=0.4)
    trainer(tmp_path, Decays()).fit(classifier, datamodule=data)
    expected = [0.4 - 0.36 * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(1, 13)]
    assert [decay for _, decay in decays] == pytest.approx(expected)
    assert {none for none, _ in decays} == {0.0}  # biases and norms never decay


CHANNEL_MODEL = "fastchannelvim_small_patch16_224"


def test_channels_are_sampled_by_batch_alone(tmp_path, data):
    seen = []

    def fit(**settings):
        seen.append([])
        classifier = Classification(
            CHANNEL_MODEL,
            {**MODEL_ARGS, "in_chans": 3},
            sample_channels=True,
            warmup_epochs=0,
        )
        run = trainer(tmp_path, Watch(), max_epochs=2, **settings)
        run.fit(classifier, datamodule=data)

    class Watch(L.Callback):
        def on_train_start(self, trainer, module):
            def watch(model, inputs):
                if model.training:
                    images, channels = inputs
                    assert images.shape[1] == len(channels)
                    seen[-1].append(tuple(channels.tolist()))

            module.model.register_forward_pre_hook(watch)

    fit()
    torch.manual_seed(9)  # of no consequence
    fit(accumulate_grad_batches=2)
    assert len(seen[0]) == 24
    assert seen[0] == seen[1]
    assert seen[0][:12] != seen[0][12:]
    assert {len(channels) for channels in seen[0]} == {1, 2, 3}


def test_only_channel_models_sample_channels(tmp_path, data):
    with pytest.raises(
        UserError, match=r"sample_channels True: expected False, as fastvim_tiny.*channelvim"
    ):
        trainer(tmp_path).fit(task(sample_channels=True), datamodule=data)


def test_a_line_of_progress_repeats_no_validation(tmp_path, data):
    output = io.StringIO()
    log = RunLog(Console(file=output, width=200))
    run = trainer(tmp_path, log, max_epochs=3, check_val_every_n_epoch=2)
    run.fit(task(ema_decay=None), datamodule=data)
    lines = [line for line in output.getvalue().splitlines() if line.startswith("epoch")]
    assert ["val acc1" in line for line in lines] == [False, True, False]


def test_a_mistake_in_a_folder_with_results_is_told_in_a_line(write_recipe, capsys):
    config = str(write_recipe(ONE_EPOCH))
    assert main(["fit", "--config", config]) == 0
    capsys.readouterr()
    assert main(["fit", "--config", config, "--data.train_images", "9999"]) != 0
    assert "train_images 9999: expected 1 to" in capsys.readouterr().err.splitlines()[-1]


def test_validation_and_export_use_the_averages_and_both_are_saved(write_recipe):
    config = write_recipe({"model.init_args.ema_decay": 0.5, **ONE_EPOCH})
    assert main(["fit", "--config", str(config)]) == 0
    saved = last(config)
    averaged, trained = saved["state_dict"], saved["current_model_state"]
    name = "model.head.weight"
    assert not torch.equal(averaged[name], trained[name])
    exported = load_file(config.with_suffix("") / "model.safetensors")
    torch.testing.assert_close(exported["head.weight"], averaged[name], rtol=0, atol=0)

    cli = TrainingCLI("validate", [f"--config={config}", "--ckpt_path=last"])
    cli.execute()
    torch.testing.assert_close(cli.model.state_dict()[name], averaged[name], rtol=0, atol=0)
    with (config.with_suffix("") / "logs" / "version_0" / "metrics.csv").open() as file:
        logged = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert float(cli.trainer.callback_metrics["val/loss"]) == pytest.approx(logged[-1], abs=1e-6)


def test_the_average_is_constant_from_the_first_step(tmp_path, data):
    history = []

    class Weights(L.Callback):
        def on_train_start(self, trainer, pl_module):
            history.append(pl_module.model.head.weight.detach().clone())

        def on_train_batch_end(self, trainer, pl_module, *args):
            history.append(pl_module.model.head.weight.detach().clone())

    classifier = task(ema_decay=0.7, lr=1.0)
    trainer(tmp_path, Weights(), limit_train_batches=4).fit(classifier, datamodule=data)
    expected = history[0]
    for weights in history[:-1]:  # it lags a step
        expected = 0.7 * expected + 0.3 * weights
    # After `fit` the module holds the averages.
    torch.testing.assert_close(classifier.model.head.weight.detach(), expected)


def test_an_average_that_will_hardly_move_is_warned_of(tmp_path, data, caplog):
    trainer(tmp_path).fit(task(ema_decay=0.999), datamodule=data)
    assert "99 % of the averaged weights will still be the initial ones" in caplog.text


def test_no_averages_when_turned_off(write_recipe):
    config = write_recipe({"model.init_args.ema_decay": None, **ONE_EPOCH})
    assert main(["fit", "--config", str(config)]) == 0
    assert "averaging_state" not in last(config)


def test_top_5_only_with_more_than_5_classes():
    def names(classes: int) -> set[str]:
        classifier = task(num_classes=classes)
        classifier.configure_model()
        return set(classifier.val_metrics.keys())

    assert names(5) == {"val/acc1"}
    assert names(6) == {"val/acc1", "val/acc5"}


def test_bfloat16_mixed_precision_trains(tmp_path, data):
    fit = trainer(tmp_path, precision="bf16-mixed", limit_train_batches=2)
    fit.fit(task(), datamodule=data)
    assert fit.callback_metrics["train/loss"].isfinite()


def test_an_unknown_model_option_is_named(tmp_path, data):
    with pytest.raises(UserError, match=r"no option 'img_sise' \(nearest: img_size"):
        trainer(tmp_path).fit(task(model_args={"img_sise": 32}), datamodule=data)


@pytest.mark.parametrize(
    ("settings", "steps", "asked", "warmup"),
    [
        ({"max_epochs": 3}, 36, 24, 24),
        ({"max_steps": 11}, 11, 24, 1),
        ({"limit_train_batches": 2}, 2, 4, 0),
    ],
    ids=["fits", "steps", "batches"],
)
def test_a_warm_up_as_long_as_the_run_is_shortened(
    tmp_path, data, caplog, settings, steps, asked, warmup
):
    """An epoch has 12 batches. The warm-up lasts two epochs, or a tenth of a shorter run."""
    rates = []

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    classifier = task(lr=0.512, warmup_epochs=2, min_lr=0.0, ema_decay=None)
    trainer(tmp_path, Rates(), **settings).fit(classifier, datamodule=data)
    assert len(rates) == steps
    assert max(rates) == pytest.approx(rates[max(warmup - 1, 0)])
    lines = [line for line in caplog.messages if "warm-up" in line]
    message = (
        f"warmup_epochs is 2 ({asked} steps) but the whole run is {steps} steps: the warm-up is "
        f"shortened to {warmup}"
    )
    assert lines == ([] if asked == warmup else [message])


def test_a_limit_that_leaves_no_batches_is_named(tmp_path, data):
    with pytest.raises(
        UserError, match=r"limit_train_batches 0\.01: expected enough for one of 12 batches"
    ):
        trainer(tmp_path, limit_train_batches=0.01).fit(task(), datamodule=data)


def test_odd_batches_cannot_be_mixed(tmp_path, image_folder):
    data = ImageData(str(image_folder), img_size=32, batch_size=7, num_workers=0)
    with pytest.raises(UserError, match="batch_size 7: expected an even one"):
        trainer(tmp_path).fit(task(), datamodule=data)


def test_an_unknown_model_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"fastvim_tinny.*nearest: fastvim_tiny_patch16_224"):
        Classification("fastvim_tinny_patch16_224", num_classes=2).configure_model()


def test_one_class_is_refused(tmp_path, image_folder):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "ant").symlink_to(image_folder / "train" / "ant")
    (tmp_path / "val").symlink_to(tmp_path / "train")
    for settings in ({}, {"num_classes": 5}):
        with pytest.raises(UserError, match="train: one class, ant: a classifier needs two"):
            trainer(tmp_path).fit(task(**settings), datamodule=ImageData(str(tmp_path)))
    with pytest.raises(UserError, match="num_classes 1: a classifier needs two"):
        trainer(tmp_path).fit(task(num_classes=1), datamodule=ImageData(str(image_folder)))


def test_images_without_classes_are_refused(tmp_path, image_folder):
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(image_folder / split / "ant")
    with pytest.raises(UserError, match=r"train: .* images outside class folders"):
        trainer(tmp_path).fit(task(num_classes=2), datamodule=ImageData(str(tmp_path)))


def test_test_writes_metrics_and_predictions(write_recipe):
    config = write_recipe(ONE_EPOCH)
    assert main(["fit", "--config", str(config)]) == 0
    assert main(["test", "--config", str(config), "--ckpt_path", "best"]) == 0
    root = config.with_suffix("")
    metrics = json.loads((root / "metrics.json").read_text())
    assert set(metrics) == {"checkpoint", "test/loss", "test/acc1", "test/acc5"}
    for picture in ("curves.png", "predictions.png"):
        assert (root / picture).read_bytes().startswith(b"\x89PNG")
