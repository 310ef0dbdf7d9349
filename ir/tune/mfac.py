"""M-FAC as an optimizer: steps along the inverse Fisher of the last gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.errors import ArgumentError
from graphwright.ir.tune.fisher import Window

MOST = 8 << 30
"""Bytes of a window at most."""


def window_bytes(values: int, gradients: int, dtype: torch.dtype = torch.float32) -> int:
    """Memory of a window of so many gradients of so many values."""
    return values * gradients * dtype.itemsize


def _check_room(values: int, gradients: int, dtype: torch.dtype) -> None:
    size = window_bytes(values, gradients, dtype)
    if size > MOST:
        fits = MOST // (values * dtype.itemsize)
        raise ArgumentError(
            f"a window of {gradients} gradients of {values} values takes {size / 2**30:.1f} GiB, "
            f"and M-FAC takes {MOST >> 30} GiB at most",
            fix=f"Lower fisher_gradients to {fits}, or train fewer parameters." if fits
            else "Train fewer parameters, or choose another optimizer.",
        )  # fmt: skip


class MfacOptimizer(torch.optim.Optimizer):
    """w <- w - lr F^-1 g, with F of the last `gradients` gradients, g among them.

    Memory is `gradients` times that of the trained parameters, all of which share one F; a window
    of more than 8 GiB is refused.

    Args:
        params: as any optimizer of torch takes them.
        lr: learning rate.
        momentum: mu of u <- mu u + (1 - mu) F^-1 g, and w <- w - lr u.
        weight_decay: added to the gradient, in front of the inverse.
        gradients: m, length of the window.
        damp: lambda of F.
        sparse: values that are zero at the start stay zero, and have no place in F; of all
            parameters, or of a group that says so.

    Source: Frantar, Kurtic, Alistarh 2021, "M-FAC", section 3.2; the defaults of their code.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        gradients: int = 1024,
        damp: float = 1e-5,
        sparse: bool = False,
    ) -> None:
        wrong = lr < 0 or not 0 <= momentum < 1 or weight_decay < 0 or gradients < 1 or damp <= 0
        if wrong:
            raise ArgumentError(
                "M-FAC takes lr >= 0, 0 <= momentum < 1, weight_decay >= 0, gradients >= 1 "
                "and damp > 0"
            )
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "sparse": sparse}
        super().__init__(params, defaults)
        tensors = self._parameters()
        self._kept = [
            (p.detach() != 0).flatten() if group["sparse"] else None for group, p in self._grouped()
        ]
        self._sizes = [
            p.numel() if kept is None else int(kept.sum())
            for p, kept in zip(tensors, self._kept, strict=True)
        ]
        first = tensors[0]
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        _check_room(sum(self._sizes), gradients, dtype)
        self.window = Window(sum(self._sizes), gradients, damp, dtype, first.device)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; a parameter without a gradient counts as one with a zero gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradient = torch.cat(
            [
                self._flat(self._gradient(p, group["weight_decay"]), kept)
                for (group, p), kept in zip(self._grouped(), self._kept, strict=True)
            ]
        )
        self.window.add(gradient)
        directions = self.window.product(gradient).split(self._sizes)
        for (group, p), kept, flat in zip(self._grouped(), self._kept, directions, strict=True):
            self._move(p, self._shaped(flat, p, kept), group["lr"], group["momentum"])
        return loss

    def _grouped(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [(group, p) for group in self.param_groups for p in group["params"]]

    def _gradient(self, p: Tensor, weight_decay: float) -> Tensor:
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        return gradient.add(p, alpha=weight_decay) if weight_decay else gradient

    def _flat(self, gradient: Tensor, kept: Tensor | None) -> Tensor:
        flat = gradient.flatten() if kept is None else gradient.flatten()[kept]
        return flat.to(self.window.gradients.dtype)

    def _shaped(self, flat: Tensor, p: Tensor, kept: Tensor | None) -> Tensor:
        if kept is None:
            return flat.view(p.shape).to(p.dtype)
        full = torch.zeros(p.numel(), dtype=p.dtype, device=p.device)
        full[kept] = flat.to(p.dtype)
        return full.view(p.shape)

    def _move(self, p: Tensor, direction: Tensor, lr: float, momentum: float) -> None:
        if momentum:
            averaged = self.state[p].setdefault("momentum", torch.zeros_like(p))
            direction = averaged.mul_(momentum).add_(direction, alpha=1 - momentum)
        p.sub_(direction, alpha=lr)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the window beside it."""
        window = {
            "gradients": self.window.gradients,
            "products": self.window.products,
            "added": self.window.added,
            "kept": self._kept,
        }
        return {**super().state_dict(), "window": window}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a `state_dict` of an optimizer with the same parameters and window."""
        window = state_dict["window"]
        if window["gradients"].shape != self.window.gradients.shape:
            raise ArgumentError(
                f"the state has a window of {tuple(window['gradients'].shape)}, and this optimizer "
                f"one of {tuple(self.window.gradients.shape)}"
            )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "window"})
        self.window.gradients.copy_(window["gradients"])
        self.window.products.copy_(window["products"])
        self.window.added = int(window["added"])
        self._kept = window["kept"]
