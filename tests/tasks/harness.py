"""Small runs of a task, in this process or in one of their own."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
import yaml

from fastvim_cli import main

# Processes begin as copies of one that has imported what they need.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["fastvim_cli.train", "fastvim.data.images", "matplotlib.pyplot"])
# Of every small model: 16 patches of 8 pixels.
MODEL_ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1}
ONE_EPOCH = {"trainer.max_epochs": 1, "model.init_args.warmup_epochs": 0}

# Sections `model` of a configuration.
PRETRAINING = {
    "class_path": "fastvim.tasks.Pretraining",
    "init_args": {
        "model": "mae_fastvim_tiny_patch16_224",
        "model_args": {**MODEL_ARGS, **DECODER, "drop_path_rate": 0.2},
        "lr": 0.02,
        "warmup_epochs": 1,
    },
}
PROBE = {
    "class_path": "fastvim.tasks.LinearProbe",
    "init_args": {
        "model": "fastvim_tiny_patch16_224",
        "model_args": MODEL_ARGS,
        "warmup_epochs": 1,
    },
}


def trainer(tmp_path: Path, *callbacks: L.Callback, **settings) -> L.Trainer:
    """A trainer for one epoch that writes nothing of its own."""
    defaults = {
        "default_root_dir": tmp_path,
        "accelerator": "cpu",
        "max_epochs": 1,
        "callbacks": list(callbacks),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**{**defaults, **settings})


def recipe(root: Path, images: Path) -> dict:
    """96 training images in batches of 8, two batches a step: 6 steps an epoch."""
    return {
        "model": {
            "class_path": "fastvim.tasks.Classification",
            "init_args": {
                "model": "fastvim_tiny_patch16_224",
                "model_args": {
                    "img_size": 32,
                    "patch_size": 8,
                    "embed_dim": 32,
                    "depth": 2,
                    "drop_path_rate": 0.2,
                },
                "lr": 0.05,
                "warmup_epochs": 1,
                "layer_decay": 0.8,
                "ema_decay": 0.9,
            },
        },
        "data": {
            "class_path": "fastvim.data.images.ImageData",
            "init_args": {
                "root": str(images),
                "img_size": 32,
                "batch_size": 8,
                "num_workers": 0,
            },
        },
        "trainer": {
            "default_root_dir": str(root),
            "accelerator": "cpu",
            "max_epochs": 3,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 1,
        },
        "checkpoint_every_n_steps": 2,
    }


def recipe_writer(folder: Path, images: Path) -> Callable[..., Path]:
    """Writes the small recipe with changes, as in `write({"trainer.max_epochs": 1})`."""

    def write(changes: dict | None = None, name: str = "run") -> Path:
        config = recipe(folder / name, images)
        for key, value in (changes or {}).items():
            *path, last = key.split(".")
            section = config
            for part in path:
                section = section[part]
            section[last] = value
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config))
        return file

    return write


def fit(config: Path, *arguments: str) -> int:
    """Run the command line in a process of its own; its exit code."""
    process = PROCESSES.Process(target=_fit, args=(str(config), *arguments))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def fit_together(config: Path, *arguments: str, processes: int = 2) -> list[int | None]:
    """Run the command line in several processes of one run, as a cluster starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        place = {"LOCAL_RANK": rank, "NODE_RANK": 0, "MASTER_ADDR": "localhost"}
        environment = {name: str(value) for name, value in {**place, "MASTER_PORT": port}.items()}
        words = (str(config), *arguments)
        process = PROCESSES.Process(target=_fit, args=words, kwargs=environment)
        process.start()
        started.append(process)
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def _fit(config: str, *arguments: str, **environment: str) -> None:
    os.environ.update(environment)
    sys.exit(main(["fit", "--config", config, *arguments]))


def last(config: Path) -> dict:
    """The last checkpoint of the run of a configuration."""
    return torch.load(config.with_suffix("") / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_training_state(one: dict, other: dict) -> None:
    """Trained and averaged weights, optimiser, schedule and counters, bit for bit."""
    assert one.keys() == other.keys()
    tensors = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "probe")
    for key in one.keys() & set(tensors):
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)
    assert one["lr_schedulers"] == other["lr_schedulers"]
    assert (one["epoch"], one["global_step"]) == (other["epoch"], other["global_step"])
