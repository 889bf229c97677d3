"""Training on several devices: copies of the weights (`ddp`), or their parts (`fsdp2`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from fastvim.tasks.sharding import broadcast_buffers, divide_as, gather, shard

SHARDED_PRECISIONS = ("32-true", "64-true", "bf16-mixed")


class CopiesStrategy(DDPStrategy):
    """Lightning's `ddp`, whose gradients arrive on the stream of the training steps.

    Lightning makes DistributedDataParallel on a stream of its own, for those who capture it as a
    CUDA graph. `GraphedModel` lies inside it and is captured alone. The gradients of all parameters
    would change streams at every step, of which torch warns.
    """

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        devices = self.determine_ddp_device_ids()
        return DistributedDataParallel(model, device_ids=devices, **self._ddp_kwargs)


class ShardedStrategy(DDPStrategy):
    """`fsdp2`: weights, gradients, averages and the optimiser's state divided among the processes.

    Blocks are gathered one at a time, for their forward and backward passes (`fully_shard`).
    Checkpoints and exported weights are whole: a run resumes with any number of processes, and with
    other strategies. Evaluations outside of training hold whole copies.
    """

    def model_to_device(self) -> None:
        assert self.lightning_module is not None
        if not self.lightning_module.fitting:  # else block by block, as they are divided
            super().model_to_device()

    def configure_ddp(self) -> None:
        task: Any = self.lightning_module
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        shard(task, mesh)
        task.to(self.root_device)
        # What calls the model, as a whole or in parts.
        for step in ("training_step", "validation_step"):
            register_fsdp_forward_method(task, step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        assert self.lightning_module is not None
        broadcast_buffers(self.lightning_module)

    def on_validation_start(self) -> None:
        assert self.lightning_module is not None
        broadcast_buffers(self.lightning_module)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return gather(super().lightning_module_state_dict(), self.is_global_zero)

    def optimizer_state(self, optimizer: optim.Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = super().optimizer_state(optimizer)
        each = state["state"].items()
        return {**state, "state": {key: gather(own, self.is_global_zero) for key, own in each}}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = []
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [each for group in optimizer.param_groups for each in group["params"]]
            divided = {
                key: {
                    name: divide_as(value, parameters[key]) if value.ndim else value
                    for name, value in own.items()
                }
                for key, own in state["state"].items()
            }
            states.append({**state, "state": divided})
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})

    def teardown(self) -> None:
        """End without moving the weights to the CPU, as Lightning does before they are exported.

        There they could not be gathered: NCCL exchanges tensors of GPUs alone.
        """
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def register() -> None:
    """Let a trainer know our strategies by name, `ddp` and `fsdp2`; several devices take `ddp`."""
    StrategyRegistry.register("ddp", CopiesStrategy, "copies of the weights", override=True)
    StrategyRegistry.register("fsdp2", ShardedStrategy, "parts of the weights", override=True)
