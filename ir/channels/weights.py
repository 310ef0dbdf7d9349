"""Stored tensors that units are slices of, and those of them that `zero` sets to zero."""

from __future__ import annotations

import torch
from torch import fx

from graphwright.ir.graph.nodes import op_name
from graphwright.ir.program import Program

MOVES = {"slice", "select", "expand", "unsqueeze", "squeeze", "to", "reshape", "permute",
         "transpose", "embedding", "index", "index_select", "alias", "clone"}  # fmt: skip


def code_reader(program: Program, name: str) -> fx.Node | None:
    """The `dequantize` call that a stored tensor is the codes of; None for other tensors.

    All readers have to be such calls; the first is returned.
    """
    nodes = list(program.graph.find_nodes(op="get_attr", target=name))
    users: list[fx.Node] = [user for node in nodes for user in node.users]
    if users and all(op_name(u) == "dequantize" and u.args[0] in nodes for u in users):
        return users[0]
    return None


def is_weight(program: Program, name: str) -> bool:
    """Whether a stored tensor holds weights: a parameter, or the codes of one."""
    if isinstance(program.state[name], torch.nn.Parameter):
        return True
    return code_reader(program, name) is not None


def is_zeroed(program: Program, name: str) -> bool:
    """Whether slices of removed units are set to zero in this tensor, and then are zero.

    Codes around a zero point stay as they are: a code of 0 is not the value 0. A fixed table
    that is only added to something would keep a removed channel alive.
    """
    if isinstance(program.state[name], torch.nn.Parameter):
        return True
    reader = code_reader(program, name)
    if reader is not None:
        return all(user.args[2] is None for node in reader.all_input_nodes[:1]
                   for user in node.users)  # fmt: skip
    return only_added(program, name)


def weight_values(program: Program) -> dict[str, torch.Tensor]:
    """Parameters by name, and what the codes of quantized ones stand for."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in program.state.items():
        if isinstance(tensor, torch.nn.Parameter):
            found[name] = tensor.detach()
        elif (reader := code_reader(program, name)) is not None:
            operands = [program.state[str(a.target)] if isinstance(a, fx.Node) else a
                        for a in reader.args]  # fmt: skip
            found[name] = torch.ops.graphwright.dequantize(*operands)
    return found


def only_added(program: Program, name: str) -> bool:
    """True for a floating-point buffer that is only ever added to something.

    Such a table (fixed positions) keeps a removed channel alive unless it is zeroed with it.
    """
    if not program.state[name].is_floating_point():
        return False
    stack = list(program.graph.find_nodes(op="get_attr", target=name))
    users = [user for node in stack for user in node.users]
    if not users:
        return False
    while users:
        user = users.pop()
        if op_name(user) in MOVES:
            users.extend(user.users)
        elif op_name(user) not in ("add", "sub"):
            return False
    return True
