"""`fastvim fit`, in one process or in many: begin together, go on from one checkpoint, end."""

from __future__ import annotations

import os
import sys
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastvim.data.base import DataModule
from fastvim.tasks.checkpoints import stop_if_refused
from fastvim.tasks.cluster.compare import CompareStart
from fastvim.tasks.cluster.peers import Peers, connect
from fastvim.tasks.cluster.signals import (
    INTERRUPT,
    REQUEUE,
    Signals,
    StopAtSignal,
    Stopped,
    requeue,
)
from fastvim.tasks.cluster.watch import Watch
from fastvim.tasks.run_folder import begin, has_begun, name_of, newest, requeued, restarts
from fastvim.weights.archive import seal
from fastvim_cli.check import check_before_fit
from fastvim_cli.console import note
from fastvim_cli.failures import Ended, explained, tell_torchrun
from fastvim_cli.train.every_run import only_run

if TYPE_CHECKING:
    from fastvim_cli.train.cli import TrainingCLI

# Seconds that a thread beside the training, as that which finishes batches, may keep it waiting.
SWITCH = 0.0005
# Options that may differ from machine to machine.
_OWN = ("config", "data.init_args.root", "data.init_args.num_workers", "model.init_args.checkpoint")
_OWN_SECTIONS = ("trainer.default_root_dir", "trainer.devices", "trainer.logger")


def fit(cli: TrainingCLI) -> None:
    """Train as a configuration says.

    Raises:
        Ended: by a signal; or another process has ended the run.
        UserError: a mistake, or what the processes do not agree about.
    """
    trainer: Any = cli.trainer
    signals = Signals(cli.config.seconds_before_limit)
    trainer._signal_connector = signals
    # Lightning asks process 0 for signals before every batch, which waits for the device.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    peers = connect(trainer, _leave, _tell)  # until then a signal ends it, wherever it waits
    signals.install()
    watch = Watch(peers, lambda: _safe(cli.root), _leave, _tell)
    try:
        with watch, cli.mistakes(), ExitStack() as stack:
            checkpoint = _begin(cli, peers, stack)
            own = [CompareStart(peers), watch.progress, StopAtSignal(signals, peers)]
            trainer.callbacks += own
            sys.setswitchinterval(SWITCH)
            trainer.fit(model=cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint)
            stop_if_refused(trainer)
        if signals.reason == INTERRUPT and peers.size == 1:  # after the last step
            raise Stopped(INTERRUPT, trainer.global_step)
    except Stopped as stop:
        signals.over = True
        _stopped(cli.root, peers, watch, stop)
    except Exception as error:
        if peers.size == 1:
            raise
        line, code = explained(error)  # told by the process that fails first, whichever it is
        raise Ended(f"error: {line}" if watch.failed(error, code) else "", code) from error
    finally:
        if signals.over and signals.reason != INTERRUPT:
            signals.ignore()  # what follows, as SIGTERM does SIGUSR1, finds the process ending
        elif peers.size == 1:  # else they are taken until the other processes have ended as well
            signals.restore()


def _begin(cli: TrainingCLI, peers: Peers, stack: ExitStack) -> str | None:
    """Look at options, data and folder before the first step; the checkpoint to go on from."""
    peers.compare(_options(cli), "start all processes with the same options")
    data, count = cli.datamodule, peers.agree(restarts())

    def first() -> tuple[str | None, str]:
        stack.enter_context(only_run(cli.root))
        checkpoint = cli.checkpoint(count)
        cli.take(checkpoint)  # before the data are looked at: it tells their classes
        if isinstance(data, DataModule):
            check_before_fit(data, cli.model.uses_labels)
        run = name_of(cli.root, checkpoint) or cli.model.run
        begin(cli.root, run, peers.token)
        return checkpoint, run

    checkpoint, cli.model.run = peers.decide(first)
    peers.require_shared(cli.root, lambda: has_begun(cli.root, peers.token))
    if checkpoint is not None:
        content = {f"the checkpoint {checkpoint}": _digest(Path(checkpoint))}
        peers.compare(content, "expected one file, on a disk that all machines share")
    if peers.rank:
        cli.take(checkpoint)
    return checkpoint


def _options(cli: TrainingCLI) -> dict[str, str]:
    """The options that all processes must have, with their values as texts."""
    found = vars(cli.config.as_flat())
    return {
        name.replace(".init_args", ""): str(value)
        for name, value in found.items()
        if name not in _OWN and not name.startswith(_OWN_SECTIONS)
    }


def _digest(file: Path) -> str:
    """A short digest of a checkpoint, from what its archive lists."""
    try:
        with zipfile.ZipFile(file) as archive:
            return seal(archive).decode()[:12]
    except (OSError, zipfile.BadZipFile) as error:
        return "not there" if isinstance(error, FileNotFoundError) else "not readable"


def _safe(root: Path) -> str:
    """What is not lost when a run ends, and how to go on."""
    found = newest(root)
    if not found:
        return "no checkpoint was written yet"
    where = os.path.relpath(found[0].path)
    return f"{where} holds step {found[0].step:,}: start all again with --ckpt_path last"


def _stopped(root: Path, peers: Peers, watch: Watch, stop: Stopped) -> NoReturn:
    """End a run that was told to: one process speaks for all, and asks SLURM to go on later."""
    speaks = peers.rank == 0
    if stop.step is None:  # before the first step, and perhaps this process alone
        speaks = watch.failed(stop, stop.code)
    else:
        peers.leave()
    watch.end()
    if not speaks:
        raise Ended("", stop.code)
    if stop.reason == INTERRUPT:
        raise Ended("interrupted; --ckpt_path last resumes", stop.code)
    advice = ""
    if stop.reason == REQUEUE and (job := requeue()):
        requeued(root, job)
        advice = "; SLURM starts the job again"
    raise Ended(f"stopped by {stop.told}{advice}; {_safe(root)}", stop.code)


def _tell(line: str) -> None:
    note(f"fastvim: {line}")


def _leave(line: str, code: int) -> NoReturn:
    """End this process at once, whatever its other threads do."""
    if line:
        note(f"fastvim: error: {line}")
        tell_torchrun(line)
    sys.stdout.flush()
    os._exit(code)
