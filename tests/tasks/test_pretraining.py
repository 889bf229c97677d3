"""Masked pre-training, and fine-tuning from its weights."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from harness import DECODER, MODEL_ARGS, ONE_EPOCH, PRETRAINING, PROBE, trainer
from torch.utils.data import DataLoader, TensorDataset

from fastvim.models import MaskedAutoencoder, create_model
from fastvim.tasks import Classification, Pretraining
from fastvim.weights import load_model, save
from fastvim_cli import main

MAE = "mae_fastvim_tiny_patch16_224"


def task(**settings) -> Pretraining:
    defaults = {
        "model_args": {**MODEL_ARGS, **DECODER},
        "warmup_epochs": 0,
        "pictures_every_n_epochs": None,
    }
    return Pretraining(MAE, **{**defaults, **settings})


class OneBatch(L.LightningDataModule):
    """The same eight images, to train and to validate."""

    batch_size = 8

    def __init__(self) -> None:
        super().__init__()
        waves = torch.linspace(0, 12, 32).sin() * torch.arange(1, 9).view(8, 1, 1, 1)
        self.images = (waves + waves.mT).expand(8, 3, 32, 32).contiguous()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.images, torch.zeros(8)), batch_size=8)

    val_dataloader = train_dataloader


class Losses(L.Callback):
    """The losses of all steps, and of all validations."""

    def __init__(self) -> None:
        self.training: list[float] = []
        self.validation: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *args) -> None:
        self.training.append(outputs["loss"].item())

    def on_validation_end(self, trainer, pl_module) -> None:
        self.validation.append(trainer.callback_metrics["val/loss"].item())


def test_the_loss_falls_on_one_batch(tmp_path):
    losses = Losses()
    fit = trainer(tmp_path, losses, max_epochs=40)
    fit.fit(task(lr=0.3), datamodule=OneBatch())
    assert losses.validation[-1] < 0.5 * losses.validation[0]


def test_validations_mask_alike_and_training_steps_do_not(tmp_path):
    losses = Losses()
    fit = trainer(tmp_path, losses, max_epochs=3)
    fit.fit(task(lr=0.0), datamodule=OneBatch())
    assert len(set(losses.validation)) == 1
    assert len(set(losses.training)) == 3


def test_the_optimiser_is_the_published_one(tmp_path, data):
    pretraining = task(warmup_epochs=0.5)
    fit = trainer(tmp_path, limit_train_batches=4, accumulate_grad_batches=2)
    rates = []

    class Rates(L.Callback):
        def on_train_batch_start(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit.callbacks.append(Rates())
    fit.fit(pretraining, datamodule=data)
    (optimizer,) = fit.optimizers
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.05}
    trained = {weight for group in optimizer.param_groups for weight in group["params"]}
    left_out = {name for name, weight in pretraining.named_parameters() if weight not in trained}
    assert left_out == {"model.encoder.pos_embed", "model.decoder_pos_embed"}
    # Two steps: the first at the warm-up's beginning, the second at its end.
    assert rates == pytest.approx([0, 0, *[1.5e-4 * 16 / 256] * 2])


def test_blocks_can_be_recomputed(tmp_path):
    weights = []
    for recompute in (False, True):
        torch.manual_seed(0)
        pretraining = task(lr=0.01, grad_checkpointing=recompute)
        trainer(tmp_path, max_epochs=2).fit(pretraining, datamodule=OneBatch())
        weights.append(pretraining.model.state_dict())
    torch.testing.assert_close(*weights)


FINETUNING = {
    "class_path": "fastvim.tasks.Classification",
    "init_args": {"model": "fastvim_tiny_patch16_224", "ema_decay": None},
}


def test_its_encoder_is_probed_and_fine_tuned(write_recipe, image_folder, capsys):
    config = write_recipe({"model": PRETRAINING, **ONE_EPOCH}, name="pretrain")
    assert main(["fit", "--config", str(config)]) == 0
    root = config.with_suffix("")
    for picture in ("curves.png", "reconstruction.png"):
        assert (root / picture).exists()
    written = root / "model.safetensors"
    autoencoder, metadata = load_model(path=written)
    assert isinstance(autoencoder, MaskedAutoencoder)
    assert (metadata["weights"], metadata["img_size"]) == ("only", 32)
    again, _ = load_model(path=root / "checkpoints" / "last.ckpt")
    torch.testing.assert_close(again.state_dict(), autoencoder.state_dict(), rtol=0, atol=0)

    runs = []
    for name, section in (("probe", PROBE), ("finetune", FINETUNING)):
        arguments = {**section["init_args"], "checkpoint": str(written)}
        arguments["model_args"] = {**MODEL_ARGS, "pool_scale": 0.25}
        runs.append(write_recipe({"model": {**section, "init_args": arguments}, **ONE_EPOCH}, name))
        assert main(["fit", "--config", str(runs[-1])]) == 0
        weights = load_model(path=runs[-1].with_suffix("") / "model.safetensors")[0].state_dict()
        encoder = autoencoder.encoder_state_dict()
        frozen = all(torch.equal(weight, weights[key]) for key, weight in encoder.items())
        assert frozen == (name == "probe")

    written.unlink()  # a resumed run does not read it again
    image = next((image_folder / "val").rglob("*.jpg"))
    for run in runs:
        assert main(["test", "--config", str(run), "--ckpt_path", "last"]) == 0
        assert "test acc1" in capsys.readouterr().out
        checkpoint = run.with_suffix("") / "checkpoints" / "last.ckpt"
        assert main(["predict", "--checkpoint", str(checkpoint), str(image)]) == 0


def test_training_starts_from_the_encoder(tmp_path, data):
    """Resized positions and a new head included."""
    torch.manual_seed(0)
    file = tmp_path / "model.safetensors"
    autoencoder = create_model(MAE, **MODEL_ARGS, **DECODER)
    save(file, autoencoder.state_dict(), {})

    class Start(L.Callback):
        def on_train_start(self, trainer, pl_module):
            weights.update({k: v.clone() for k, v in pl_module.model.state_dict().items()})

    weights: dict[str, torch.Tensor] = {}
    options = {**MODEL_ARGS, "img_size": 48, "pool_scale": 0.25}
    classifier = Classification(
        "fastvim_tiny_patch16_224", options, checkpoint=str(file), ema_decay=None, warmup_epochs=0
    )
    trainer(tmp_path, Start(), limit_train_batches=1).fit(classifier, datamodule=data)
    encoder = autoencoder.encoder_state_dict()
    assert weights.keys() - encoder.keys() == {"head.weight", "head.bias"}
    assert weights["pos_embed"].shape == (1, 36, 16)
    for name in encoder.keys() - {"pos_embed"}:
        assert torch.equal(weights[name], encoder[name])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"class_path": "fastvim.tasks.Classification", "init_args": {"model": MAE}},
            "mae_fastvim_tiny_patch16_224 is a masked autoencoder and has no classes",
        ),
        (
            {"class_path": "fastvim.tasks.LinearProbe", "init_args": {"model": MAE}},
            "mae_fastvim_tiny_patch16_224 is a masked autoencoder and has no classes",
        ),
        (
            {**PRETRAINING, "init_args": {"model": "fastvim_tiny_patch16_224"}},
            "fastvim_tiny_patch16_224 is not a masked autoencoder: expected a model whose name",
        ),
        (
            {**PRETRAINING, "init_args": {"model": MAE, "model_args": {"mask_ratio": 1.5}}},
            "mask_ratio 1.5: expected at least 0 and less than 1",
        ),
    ],
)
def test_mistakes_are_one_line(write_recipe, section, message, capsys):
    assert main(["fit", "--config", str(write_recipe({"model": section}))]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_there_is_nothing_to_test(write_recipe, capsys):
    config = write_recipe({"model": PRETRAINING, **ONE_EPOCH, "trainer.fast_dev_run": True})
    assert main(["fit", "--config", str(config)]) == 0
    weights = config.with_suffix("").with_name("weights.safetensors")
    autoencoder = create_model(MAE, **PRETRAINING["init_args"]["model_args"])
    save(weights, autoencoder.state_dict(), {})
    arguments = ["--config", str(config), "--model.checkpoint", str(weights)]
    assert main(["validate", *arguments]) == 0
    assert "val loss" in capsys.readouterr().out
    assert main(["test", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
