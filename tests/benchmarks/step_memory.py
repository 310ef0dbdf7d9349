"""Memory of a training step, counted by torch's own allocations: the same in every run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def peak_bytes(call: Callable[[], object]) -> int:
    """Largest sum of live allocations during a call beyond what was there before, in bytes."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    live = peak = 0
    events = [e for e in results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, a shared storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def saved_bytes(call: Callable[[], object], kept: Iterable[Tensor]) -> int:
    """Bytes of the tensors that autograd remembers for a call's backward pass, a storage once.

    Args:
        call: runs a forward pass.
        kept: tensors that are there anyway, such as parameters.
    """
    there = {t.untyped_storage().data_ptr() for t in kept}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in there:
            found[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    total = stored_bytes(found.values())
    del output
    return total


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]
