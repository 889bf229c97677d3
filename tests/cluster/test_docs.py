"""The trainings of docs/clusters.md, in the variables of their clusters, simulated here."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from harness import assert_same_training_state, last
from processes import PATIENCE, errors, free_port, start

from fastvim_cli import main

TEXT = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text().split("\n# Training\n")[1]
BATCH, TORCHRUN = re.findall(r"```bash\n(.*?)```", TEXT.replace("\\\n", " "), re.DOTALL)
SERVICE, JOB = yaml.safe_load_all(re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[0])
POD = JOB["spec"]["template"]["spec"]
COMMANDS = {
    "srun": shlex.split(BATCH, comments=True),
    "kubernetes": POD["containers"][0]["command"],
    "torchrun": shlex.split(TORCHRUN, comments=True),
}
# Stands for SLURM's: starts the tasks of two machines, and waits for them.
SRUN = """#!{python}
import os, subprocess, sys
assert sys.argv[1] == "fastvim"
tasks = []
for rank in range(2):
    place = {{"SLURM_PROCID": rank, "SLURM_LOCALID": 0, "SLURM_NODEID": rank}}
    variables = {{**os.environ, **{{name: str(value) for name, value in place.items()}}}}
    command = [sys.executable, "-m", "fastvim_cli", *sys.argv[2:]]
    tasks.append(subprocess.Popen(command, env=variables))
sys.exit(max(task.wait() for task in tasks))
"""


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def words_here(words: list[str], config: Path, images: Path) -> list[str]:
    """A command of the docs on two machines with one process each, with files that are here."""
    here = {
        "--config": str(config),
        "--data.root": str(images),
        "--trainer.default_root_dir": str(config.with_suffix("")),
        "--trainer.num_nodes": "2",
        "--trainer.devices": "1",
        "--checkpoint_every_n_steps": "2",
    }
    assert here.keys() <= {*words}
    return [here.get(before, word) for before, word in zip(["", *words], words, strict=False)]


def python_path() -> str:
    return os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])


@pytest.fixture
def whole(write_recipe) -> dict:
    """The last checkpoint of two processes that nothing ends."""
    config = write_recipe({"trainer.max_epochs": 2}, "whole")
    options = ("--trainer.num_nodes=2", "--trainer.devices=1")
    assert [run.end() for run in start(config, *options, processes=2, nodes=2)] == [0, 0]
    return last(config)


@pytest.mark.parametrize("where", COMMANDS)
def test_the_commands_are_those_of_fastvim(where, capsys):
    words = COMMANDS[where]
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*words[words.index("fit") :], "--print_config"])
    told = yaml.safe_load(capsys.readouterr().out)
    assert (told["trainer"]["num_nodes"], told["trainer"]["devices"]) == (4, "8")
    assert told["ckpt_path"] == "last"


def test_the_numbers_agree():
    header = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", BATCH, re.MULTILINE))
    assert header["nodes"] == value(COMMANDS["srun"], "--trainer.num_nodes")
    devices = value(COMMANDS["srun"], "--trainer.devices")
    assert header["ntasks-per-node"] == header["gpus-per-node"] == devices
    assert header["job-name"] not in ("bash", "interactive")  # which are not put back
    command, job = COMMANDS["kubernetes"], JOB["spec"]
    assert str(job["completions"]) == str(job["parallelism"]) == value(command, "--nnodes")
    assert value(command, "--nnodes") == value(command, "--trainer.num_nodes")
    limits = POD["containers"][0]["resources"]["limits"]
    assert str(limits["nvidia.com/gpu"]) == value(command, "--nproc-per-node")
    assert value(command, "--nproc-per-node") == value(command, "--trainer.devices")
    # The first pod's name, below the service's.
    assert value(command, "--master-addr") == f"{JOB['metadata']['name']}-0.{POD['subdomain']}"
    assert POD["subdomain"] == SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["selector"] == {"batch.kubernetes.io/job-name": JOB["metadata"]["name"]}


@pytest.mark.cluster
def test_the_script_of_slurm(write_recipe, image_folder, slurm, whole):
    """Run by a shell: SIGUSR1 puts the job back, and the same script goes on."""
    announced = {"signal": int(signal.SIGUSR1), "batch": 4}
    callbacks = [{"class_path": "stops.SignalAt", "init_args": announced}]
    changes = {"trainer.max_epochs": 2}
    config = write_recipe({**changes, "trainer.callbacks": callbacks})
    script = config.with_suffix(".sh")
    header = BATCH.partition("srun ")[0]
    command = shlex.join(words_here(COMMANDS["srun"], config, image_folder))
    script.write_text(header + command)
    program = slurm / "srun"
    program.write_text(SRUN.format(python=sys.executable))
    program.chmod(0o755)
    variables = {
        **os.environ,
        "PATH": f"{slurm}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": python_path(),
        "SLURM_JOB_ID": str(free_port() % 10000),  # the port follows from it
        "SLURM_JOB_NAME": "fastvim",
        "SLURM_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
    }

    def run() -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", script], env=variables, capture_output=True, text=True, timeout=PATIENCE
        )

    first = run()
    assert first.returncode == 143, first.stderr
    assert (slurm / "asked").read_text() == f"requeue {variables['SLURM_JOB_ID']}\n"
    assert 0 < last(config)["global_step"] < whole["global_step"]
    write_recipe(changes)
    variables["SLURM_RESTART_COUNT"] = "1"
    again = run()
    assert again.returncode == 0, again.stderr
    assert "started again: goes on from " in again.stdout
    assert_same_training_state(whole, last(config))


@pytest.mark.cluster
def test_the_job_of_kubernetes(write_recipe, image_folder, whole):
    """A pod that is lost ends the other one; both are started again, and go on."""
    kill = {"class_path": "stops.KillOnce", "init_args": {"batch": 5}}
    changes = {"trainer.max_epochs": 2}
    config = write_recipe({**changes, "trainer.callbacks": [kill]})
    command = words_here(COMMANDS["kubernetes"], config, image_folder)
    logs = [config.with_name(f"pod{index}.log") for index in range(2)]

    def run() -> list[int]:
        here = {"--nnodes": "2", "--nproc-per-node": "1", "--master-addr": "127.0.0.1"}
        here["--master-port"] = str(free_port())
        _, *words = [here.get(a, b) for a, b in zip(["", *command], command, strict=False)]
        pods = []
        for index, log in enumerate(logs):
            # As the kubelet expands it.
            own = [word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in words]
            program = [sys.executable, "-m", "torch.distributed.run", "--local-addr=127.0.0.1"]
            variables = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
            with log.open("w") as out:
                pods.append(
                    subprocess.Popen([*program, *own], stdout=out, stderr=out, env=variables)
                )
        try:
            return [pod.wait(PATIENCE) for pod in pods]
        finally:
            for pod in pods:
                pod.kill()

    assert 0 not in run()
    text = "".join(log.read_text() for log in logs)
    assert len(errors(text)) == 1, text
    write_recipe(changes)
    assert run() == [0, 0], "".join(log.read_text() for log in logs)
    assert_same_training_state(whole, last(config))
