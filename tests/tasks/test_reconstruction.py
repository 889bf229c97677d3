"""Pictures of a masked autoencoder: every pixel of the panels; the run is not affected."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from fastvim.errors import UserError
from fastvim.models import MaskedAutoencoder
from fastvim.pictures.reconstruction import draw_reconstruction
from fastvim.pictures.sheet import GAP, MARGIN, NOTE_SIZE, TEXT_SIZE
from fastvim.reconstruction import reconstruct
from fastvim.tasks.callbacks.ema import EMA
from fastvim.tasks.callbacks.reconstruction import ReconstructionPictures

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
SIZES = {"patch_size": 4, "embed_dim": 16, "depth": 1, "decoder_embed_dim": 12, "decoder_depth": 1}


def autoencoder(**options) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(16, **{**SIZES, **options})


def pixels_of(batch: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    """Images in [0, 1]."""
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def normalise(pixels: torch.Tensor, mean=MEAN, std=STD) -> torch.Tensor:
    shift, scale = (torch.tensor(value).view(-1, 1, 1) for value in (mean, std))
    return (pixels - shift) / scale


def predict_perfectly(model: MaskedAutoencoder, images: torch.Tensor) -> None:
    """Make the decoder give what the loss asks for."""
    target = model.patchify(images)
    if model.norm_pix_loss:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    model.forward_decoder = lambda latent, ids_keep, grid: target


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (12, 28), (18, 13)], ids=str)
def test_a_perfect_prediction_gives_the_original(norm_pix_loss, size):
    model, pixels = autoencoder(norm_pix_loss=norm_pix_loss), pixels_of(2, *size)
    predict_perfectly(model, normalise(pixels))
    result = reconstruct(model, normalise(pixels), MEAN, STD)
    assert result.loss < 1e-10
    for panel in (result.original, result.predicted, result.completed):
        torch.testing.assert_close(panel, pixels, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (12, 28), (18, 13)], ids=str)
def test_every_pixel_is_hidden_or_visible(size):
    model, pixels = autoencoder(), pixels_of(3, *size)
    images = normalise(pixels)
    result = reconstruct(model, images, MEAN, STD, mask_ratio=0.6, seed=7)
    output = model.eval()(images, mask_ratio=0.6, generator=torch.Generator().manual_seed(7))
    assert result.hidden == pytest.approx(output.mask.mean().item())
    assert torch.equal(result.loss, output.loss)
    height, width = size
    across = -(-width // 4)
    for image, mask in enumerate(output.mask):
        for y in range(height):
            for x in range(width):
                own = (image, slice(None), y, x)
                original, predicted = result.original[own], result.predicted[own]
                hidden = mask[y // 4 * across + x // 4] == 1
                grey = torch.full((3,), 0.5)
                assert torch.equal(result.masked[own], grey if hidden else original)
                assert torch.equal(result.completed[own], predicted if hidden else original)
    torch.testing.assert_close(result.original, pixels)


def test_patches_get_their_own_mean_and_deviation_back():
    model, pixels = autoencoder(), pixels_of(1, 8, 8)
    images = normalise(pixels)
    model.forward_decoder = lambda latent, ids_keep, grid: torch.ones(1, 4, 48)
    predicted = reconstruct(model, images, (0.0,), (0.1,)).predicted
    patch = images[0, :, :4, 4:]  # the second one; a prediction of 1 is its mean plus deviation
    expected = ((patch.mean() + patch.std()) * 0.1).clamp(0, 1)
    torch.testing.assert_close(predicted[0, :, :4, 4:], expected.expand(3, 4, 4))


def test_the_seed_gives_the_mask_and_nothing_else_is_drawn():
    model, images = autoencoder(drop_path_rate=0.5).train(), normalise(pixels_of(4, 16, 16))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (
        reconstruct(model, images, MEAN, STD, seed=seed).masked for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def panels_of(picture: Image.Image, height: int, width: int, column: int) -> list[np.ndarray]:
    """Of the first row of a picture."""
    pixels, top = np.asarray(picture), MARGIN + TEXT_SIZE + GAP
    lefts = [MARGIN + i * (column + GAP) + (column - width) // 2 for i in range(4)]
    return [pixels[top : top + height, left : left + width] for left in lefts]


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_picture_holds_the_panels_pixel_for_pixel(channels):
    model = autoencoder(in_chans=channels)
    result = reconstruct(model, pixels_of(1, 28, 24, channels), (0.0,), (1.0,))
    picture = draw_reconstruction(result)
    assert picture.mode == "RGB"
    for shown, panel in zip(panels_of(picture, 224, 192, 192), result[:4], strict=True):
        values = (panel[0] * 255).round().byte()
        values = values if channels == 3 else values[:1].expand(3, -1, -1)
        enlarged = values.permute(1, 2, 0).repeat_interleave(8, 0).repeat_interleave(8, 1)
        assert np.array_equal(shown, enlarged.numpy())


def test_a_large_image_keeps_its_size_and_a_narrow_one_its_captions():
    model = autoencoder(norm_pix_loss=False)
    wide = draw_reconstruction(reconstruct(model, pixels_of(1, 40, 448), (0.0,), (1.0,)))
    assert wide.size == (4 * 448 + 3 * GAP + 2 * MARGIN, 40 + 2 * MARGIN + GAP + TEXT_SIZE)
    narrow = draw_reconstruction(reconstruct(model, pixels_of(1, 224, 8), (0.0,), (1.0,)))
    assert narrow.width > 4 * 100


def test_a_note_tells_of_borrowed_means_and_deviations():
    with_note, without = (
        draw_reconstruction(
            reconstruct(autoencoder(norm_pix_loss=norm), pixels_of(1, 16, 4), (0.0,), (1.0,))
        )
        for norm in (True, False)
    )
    assert with_note.height - without.height == NOTE_SIZE + GAP
    below = np.asarray(with_note)[-MARGIN - NOTE_SIZE :]
    assert (below < 255).any()
    assert (below[:, -MARGIN:] == 255).all()  # it fits below the narrowest panels


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 4, 1), (3, 4, 3), (4, 8, 2), (7, 8, 4)])
def test_a_grid_of_images(count, columns, rows):
    result = reconstruct(autoencoder(), pixels_of(count, 16, 16), (0.0,), (1.0,))
    width, height = draw_reconstruction(result).size
    assert width // 224 == columns
    assert height // 224 == rows


class Images(L.LightningDataModule):
    """16 images to train on, 20 to validate."""

    mean, std = (0.5,), (0.25,)

    def loader(self, seed: int, count: int) -> DataLoader:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(count, 1, 16, 16, generator=generator)
        return DataLoader([(image, 0) for image in images], batch_size=8)

    def train_dataloader(self):
        return self.loader(1, 16)

    def val_dataloader(self):
        return self.loader(2, 20)


class Masked(L.LightningModule):
    """The least that trains a masked autoencoder, its masks drawn from torch's own generator."""

    def __init__(self, averaged: bool = False) -> None:
        super().__init__()
        self.model = autoencoder(in_chans=1, drop_path_rate=0.3)
        self.averaged = averaged

    def configure_callbacks(self):
        return [EMA(0.5)] if self.averaged else []

    def training_step(self, batch, batch_idx):
        return self.model(batch[0]).loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.model(batch[0]).loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, *callbacks, task=None, data=None, **settings) -> Masked:
    defaults = {"max_epochs": 3, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(
        default_root_dir=folder, callbacks=list(callbacks), **{**quiet, **defaults, **settings}
    )
    task = task or Masked()
    torch.manual_seed(0)
    trainer.fit(task, datamodule=data or Images())
    return task


class Drawn(ReconstructionPictures):
    """Remembers the epochs at which it drew, and the weights it drew from."""

    def __init__(self, *args, **settings) -> None:
        super().__init__(*args, **settings)
        self.epochs, self.weights = [], []

    def _draw(self, trainer, pl_module):
        super()._draw(trainer, pl_module)
        self.epochs.append(trainer.current_epoch)
        self.weights.append(pl_module.model.mask_token.detach().clone())


def test_a_run_is_the_same_with_pictures_and_without(tmp_path):
    drawn = Drawn(every_n_epochs=1, images=5)
    with_pictures, without = fit(tmp_path, drawn), fit(tmp_path)
    assert drawn.epochs == [0, 1, 2]
    for name, weight in without.state_dict().items():
        assert torch.equal(with_pictures.state_dict()[name], weight), name


def test_the_same_images_under_the_same_masks_in_file_and_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoardLogger(tmp_path, "logs")
    loggers = [CSVLogger(tmp_path, "logs"), log]
    fit(tmp_path, ReconstructionPictures(2, images=5), logger=loggers)
    events = EventAccumulator(log.log_dir, size_guidance={"images": 0})
    events.Reload()
    logged = events.Images("val/reconstruction")
    assert [picture.step for picture in logged] == [4, 6]  # after epoch 2, and at the end
    (tmp_path / "logged.png").write_bytes(logged[1].encoded_image_string)
    (tmp_path / "earlier.png").write_bytes(logged[0].encoded_image_string)
    last, file, earlier = (
        np.asarray(Image.open(tmp_path / f"{name}.png"))
        for name in ("logged", "reconstruction", "earlier")
    )
    assert np.array_equal(last, file)
    firsts, lasts = (panels_of(Image.fromarray(p), 224, 224, 224) for p in (earlier, last))
    same = [np.array_equal(first, last) for first, last in zip(firsts, lasts, strict=True)]
    assert same == [True, True, False, False]


def test_pictures_are_of_the_weights_that_the_run_ends_with(tmp_path):
    drawn = Drawn(every_n_epochs=10, images=2)
    task = fit(tmp_path, drawn, task=Masked(averaged=True), max_epochs=-1, max_steps=5)
    assert len(drawn.epochs) == 1  # 5 steps are two and a half epochs; the last is not validated
    assert torch.equal(drawn.weights[0], task.model.mask_token)
    assert (tmp_path / "reconstruction.png").exists()


def test_pictures_are_of_the_averages(tmp_path):
    drawn = Drawn(every_n_epochs=1, images=2)
    task = fit(tmp_path, drawn, task=Masked(averaged=True), max_epochs=1)
    assert len(drawn.epochs) == 1
    assert torch.equal(drawn.weights[0], task.model.mask_token)  # after `fit`, the averages


def test_the_images_are_spread_over_the_validation_images(tmp_path):
    pictures = ReconstructionPictures(images=6)
    fit(tmp_path, pictures, max_epochs=1)
    images = torch.stack([image for image, _ in Images().val_dataloader().dataset])
    chosen = (pictures._images[:, None] == images).flatten(2).all(2).nonzero()[:, 1].tolist()
    assert len(set(chosen)) == 6
    assert {index // 8 for index in chosen} == {0, 1, 2}  # of every batch


class Bare(L.LightningDataModule):
    train_dataloader = Images.train_dataloader
    loader = Images.loader


class Linear(Masked):
    def __init__(self):
        super().__init__()
        self.model = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": Bare()}, "need the mean and std"),
        ({"task": Linear()}, "Linear has no masked autoencoder"),
    ],
    ids=["normalisation", "task"],
)
def test_mistakes_are_told_when_training_starts(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        fit(tmp_path, ReconstructionPictures(), **settings)


def test_counts_below_one(tmp_path):
    with pytest.raises(UserError, match="every_n_epochs 0: expected 1 or more"):
        ReconstructionPictures(every_n_epochs=0)
