"""One process or many: those that accelerate's launcher or torchrun started."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from graphwright.ir.errors import ArgumentError

SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU")
"""Kinds of launch in which every process holds the whole model."""


LAUNCHERS = "`accelerate launch --multi_gpu` for GPUs, and `torchrun` for processes on CPUs"


class Processes:
    """The processes that train together; one where nothing was launched.

    Attributes:
        device: of this process.
        rank: number of this process. count: how many there are.
    """

    def __init__(self, device: torch.device) -> None:
        """Finds the other processes.

        Raises:
            ArgumentError: accelerate is not installed, or launched in another way than `device`
                or this engine can take.
        """
        self.accelerator = _accelerator(device)
        kind = str(self.accelerator.distributed_type.name)
        if kind not in SUPPORTED:
            raise ArgumentError(
                f"tuning cannot run under accelerate's {kind}",
                fix=f"Use {LAUNCHERS}.",
            )
        self.count = int(self.accelerator.num_processes)
        self.rank = int(self.accelerator.process_index)
        self.device = self.accelerator.device if self.count > 1 else device
        if self.device.type != device.type:
            raise ArgumentError(
                f"the launcher runs {self.count} processes on {self.device.type}, and the job is "
                f"for {device.type}",
                fix=f"Use {LAUNCHERS}.",
            )

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def wrap(self, model: nn.Module, trained: Iterable[str]) -> nn.Module:
        """The model with its gradients averaged over processes; itself where there is one.

        What is not trained is the same everywhere and shared with other programs: it is neither
        compared nor written to.
        """
        if self.count == 1:
            return model
        kept = set(trained)
        names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        ignored = [name for name in names if name not in kept]
        torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, ignored
        )
        wrapped: nn.Module = self.accelerator.prepare_model(model)
        return wrapped

    def mean_(self, tensors: list[Tensor]) -> None:
        """Replaces every tensor by its mean over processes, in one message.

        Every process gives the same tensors in the same order.
        """
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
        flat = self.accelerator.reduce(flat, reduction="mean")
        start = 0
        for tensor in tensors:
            piece = flat[start : start + tensor.numel()].reshape(tensor.shape)
            tensor.detach().copy_(piece)
            start += tensor.numel()

    def from_main(self, value: float) -> float:
        """The main process's value, everywhere."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast

        sent: Any = broadcast(torch.tensor(value, dtype=torch.float64, device=self.device))
        return float(sent)


def _accelerator(device: torch.device) -> Any:
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import is_initialized
    except ImportError as error:
        raise ArgumentError("tuning needs accelerate", fix="Install graphwright[tune].") from error
    # A parameter may have no part in the loss, such as a second output's head.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    try:
        return Accelerator(
            cpu=device.type == "cpu" and not is_initialized(),
            mixed_precision="no",  # the engine does its own
            device_placement=False,
            kwargs_handlers=[unused],
        )
    except ValueError as error:  # this process has set accelerate up in another way before
        first = str(error).splitlines()[0]
        raise ArgumentError(f"accelerate cannot be set up for tuning: {first}") from error
