"""OTO in a training loop of one's own: an optimizer that also prunes, and the smaller program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphwright.ir.channels import cut_tensors
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.program import Program
from graphwright.ir.trace.capture import trace
from graphwright.ir.trace.dims import Dynamic
from graphwright.passes.prune._oto.options import Otov2Options
from graphwright.passes.prune._oto.training import (
    figures,
    find_units,
    learning_rates,
    make_shrink,
    remove_zeros,
)


class Oto(torch.optim.Optimizer):
    """An ordinary optimizer that brings zero-invariant groups to zero as it trains.

    It shares `param_groups` and `state` with the optimizer it stands around, so that learning rate
    schedules and gradient scalers work on it as on any other. Made by `gw.oto`.

    Attributes:
        optimizer: the one inside.
        steps: steps made so far.
        units: what may go.
        kept: (group, reason) of what may not.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        program: Callable[[], Program],
        options: Otov2Options,
        total_steps: int | None,
    ) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, dict(optimizer.defaults))
        self._share()
        moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._parameters = {n: p for n, p in parameters.items() if id(p) in moved}
        self._program, self._options = program, options
        self.units, actions = find_units(program(), options, self._parameters)
        self.kept = tuple((action.layer, action.reason) for action in actions)
        self._shrink = make_shrink(self.units, options, total_steps, optimizer)
        self.steps = 0

    def _share(self) -> None:
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def step(self, closure: Callable[[], Any] | None = None, *, loss: Any = None) -> Any:
        """One step of the optimizer inside, and what pruning makes of it.

        Args:
            closure: computes the loss and its gradients, as for any optimizer.
            loss: of this step, where there is no closure; only `hesso_cric` asks for it.

        Returns:
            The loss, if it is known.

        Raises:
            ArgumentError: `hesso_cric` is not told the loss.
        """
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._shrink.needs_loss and loss is None:
            raise ArgumentError("hesso_cric looks at the loss of every step",
                                fix="Call step(closure), or step(loss=loss).")  # fmt: skip
        with torch.no_grad():
            value = float(loss.detach() if isinstance(loss, Tensor) else loss or 0.0)
            self._shrink.before(self.steps, self._parameters, None if loss is None else value)
            self.optimizer.step()
            rates = learning_rates(self.optimizer, self._parameters)
            self._shrink.after(self.steps, self._parameters, rates)
        self.steps += 1
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer inside."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while it is made: units are found once."""
        if hasattr(self, "steps"):
            raise ArgumentError("parameters cannot be added to an optimizer that prunes",
                                fix="Add them to the optimizer before gw.oto.")  # fmt: skip
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer inside, and of the pruning under `oto`."""
        own = {"steps": self.steps, **self._shrink.state_dict()}
        return {**self.optimizer.state_dict(), "oto": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave; the model's weights are loaded on their own.

        Raises:
            ArgumentError: it is no state of such an optimizer, or of one for another model.
        """
        own = dict(state_dict.get("oto", {}))
        pruned = own.get("pruned")
        if not isinstance(pruned, Tensor) or len(pruned) != self.units.count:
            raise ArgumentError(f"no state of an optimizer with {self.units.count} units",
                                where="Oto.load_state_dict")  # fmt: skip
        inner = {name: value for name, value in state_dict.items() if name != "oto"}
        self.optimizer.load_state_dict(inner)
        self._share()
        self.steps = int(own.pop("steps"))
        self._shrink.load_state_dict(own)

    @torch.no_grad()
    def sparsity(self) -> float:
        """Share of the units that are exactly zero now."""
        return float(self.units.zeros(self._parameters).double().mean())

    @torch.no_grad()
    def construct(self) -> Program:
        """The model as it is now, in inference mode, without its zero units.

        The model is left as it is. Figures are in `facts["oto"]` of the result.

        Raises:
            ContractError: the smaller program differs from the model by more than rounding.
        """
        sparse, zero = self._program(), self.units.zeros(self._parameters)
        smaller, picks, error = remove_zeros(
            sparse, self.units, zero, self._options.group_divisible
        )
        found = {**figures(self.units, picks), "cut_error": error}
        return smaller.replace(facts={**smaller.facts, "oto": found})

    @torch.no_grad()
    def cut_state(self) -> dict[str, dict[str, Any]]:
        """State of the optimizer inside, by parameter name, cut as `construct` cuts the model.

        For going on with the smaller program: moments and momenta fit its parameters; what is no
        tensor of a parameter's shape, such as a count of steps, is as it was.
        """
        sparse, zero = self._program(), self.units.zeros(self._parameters)
        picks = self.units.picks(zero, self._options.group_divisible)
        found: dict[str, dict[str, Any]] = {}
        for name, parameter in self._parameters.items():
            if name not in sparse.state or parameter not in self.state:
                continue
            found[name] = own = dict(self.state[parameter])
            for key, value in own.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    own[key] = cut_tensors(sparse, picks, {name: value})[name]
        return found


def oto(
    model: nn.Module | Program,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None,
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int | None = None,
    dynamic: Dynamic | str | None = None,
    **options: Any,
) -> Oto:
    """Makes an optimizer prune as it trains: OTO in a training loop of your own.

        optimizer = gw.oto(model, (x,), torch.optim.SGD(model.parameters(), lr=0.1),
                           total_steps=10_000, sparsity=0.7)
        for x, y in loader:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        compressed = optimizer.construct()

    Args:
        model: what is trained; a program is trained through its own parameters.
        example_inputs: as for `gw.trace`; None for a program.
        optimizer: any optimizer of the model's parameters, made for it as usual.
        total_steps: steps there will be; lengths that are not given follow from it.
        dynamic: as for `gw.trace`.
        options: those of `prune.otov2`, but for `tune`.

    Raises:
        ArgumentError: options do not go together, or pruning does not end within `total_steps`.
        ModelError: nothing can be pruned, or the model cannot be traced.
    """
    from graphwright.passes.prune.otov2 import Otov2

    if "tune" in options:
        raise ArgumentError("the training loop is yours: gw.oto takes no `tune`")
    parsed: Otov2Options = Otov2(**options).options
    if isinstance(model, Program):
        held = model
        return Oto(optimizer, held.trainable(), held.eval, parsed, total_steps)
    if example_inputs is None:
        raise ArgumentError("gw.oto traces the model, and needs example_inputs")
    module, inputs = model, example_inputs
    named = dict(module.named_parameters(remove_duplicate=False))
    live = {name: p for name, p in named.items() if p.requires_grad}
    if not live:
        raise ModelError("the model has no trainable parameter")

    def traced() -> Program:
        with torch.no_grad():
            return trace(module, inputs, dynamic)  # type: ignore[arg-type]

    return Oto(optimizer, live, traced, parsed, total_steps)
