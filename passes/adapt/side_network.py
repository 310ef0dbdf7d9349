"""adapt.side_network: a narrow network along a frozen one, with no backward through that."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from graphwright.ir.adapters.record import Adapter, adapters, record
from graphwright.ir.edit import Editor
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.graph.nodes import adapter_of, set_gw_meta
from graphwright.ir.options import Options, Selector
from graphwright.ir.program import Program
from graphwright.passes.adapt._form.adapter import freeze
from graphwright.passes.adapt._side.downsample import Downsample, downsampled, drawn
from graphwright.passes.adapt._side.narrow import Narrow
from graphwright.passes.adapt._side.stack import Block, Stack, ancestors, find_stack
from graphwright.passes.base import Action, Context, Pass, Result

aten = torch.ops.aten

GATE = 0.5
"""Start of a gate in front of its sigmoid."""


class SideNetworkOptions(Options):
    """Options of adapt.side_network."""

    reduction: Annotated[int, Field(ge=1)] = 16
    """The side network has 1 / `reduction` of the model's features, and as many heads."""

    downsample: Downsample = "adapter"
    """From the model's width to the side network's: `adapter`, two matrices with an activation
    between and a norm behind (the paper's choice); `low_rank`, two matrices; `linear`, one; or
    without parameters the largest (`max_pool`) or the mean (`avg_pool`) of neighbours."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Values between the two matrices of `adapter` and `low_rank`."""

    mix: Literal["convex", "added"] = "convex"
    """What goes on to the head, from the model's state h and the side network's s: a h + (1 - a) s
    with a learned a, 1 at the start (the paper's), or h + a s, where s starts at zero."""

    blocks: str | None = None
    """Prefix of the chain of blocks, as `model.layers`; the chain that most products are in when
    absent."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")] = "side"
    """Name of the side network among the program's adapters."""

    also_train: Selector = ()
    """Layers behind the mix whose own parameters stay trainable, such as a new classifier: selector
    patterns."""


class SideNetwork(Pass[SideNetworkOptions]):
    """Puts a narrow copy of a model's blocks beside it, and trains that alone.

    Side block i reads a mix (1 - z) d_i(h_i) + z s_(i-1) of the model's state behind its block i,
    brought to the side network's width by d_i, and of the side network's own; z is the sigmoid of a
    learned vector. It is the model's block at 1 / `reduction` of its width: attention with the
    same heads, mask and positions, with parameters of its own. Behind the last block (and a copy
    of the final norm) the state goes up to the model's width, is mixed with the model's, and read
    by the frozen head. Since nothing that is trained is in front of a layer of the model, no
    gradient goes through it: its activations are not kept, and its weights may be in any codes.
    At the start the function is the model's.

    Source: Zhang et al. 2024, "Quantized Side Tuning: Fast and Memory-Efficient Tuning of Quantized
    Large Language Models", section 3. The published code starts the mix at sigmoid(1) = 0.73, which
    is not the model; here a is stored as it is, and starts at 1. Its d_1 reads the embedding too.
    """

    contract = "identity_at_init"
    weights = "kept"
    papers = ("P01",)

    def run(self, program: Program, context: Context) -> Result:
        options = self.options
        if options.name in adapters(program):
            raise ArgumentError(
                f"the program has an adapter {options.name!r} already", fix="Set another `name`."
            )
        if other := next(filter(None, map(adapter_of, program.graph.nodes)), None):
            raise ModelError(
                f"the model has the adapter {other!r} beside its layers, which a narrow copy of "
                "them cannot take over",
                fix="Put adapt.merge before it.",
            )
        editor = Editor(program, by=self.id)
        stack = find_stack(editor.graph, options.blocks)
        width = stack.end.meta["val"].shape[-1]
        if width % options.reduction:
            raise ModelError(
                f"the model's width {width} is no multiple of the reduction {options.reduction}",
                fix="Choose a `reduction` that divides it.",
            )
        side = _Side(editor, options, context, int(width), stack.end.meta["val"].dtype)
        frozen = freeze(editor, program, options.also_train)
        _refuse_trained_trunk(editor, stack)
        side.build(stack)
        record(
            editor,
            Adapter(options.name, self.id, self.resolved_options(), {}, frozen=frozen,
                    shared=side.parts),
        )  # fmt: skip
        result = editor.finish()
        narrow = int(width) // options.reduction
        actions = [Action(block.name, f"side block of width {narrow}") for block in stack.blocks]
        trained = sum(p.numel() for p in result.trainable().values())
        return Result(result, tuple(actions), {
            "side_blocks": float(len(stack.blocks)), "side_width": float(narrow),
            "trainable_parameters": float(trained),
        })  # fmt: skip


def _refuse_trained_trunk(editor: Editor, stack: Stack) -> None:
    """Raises ModelError where something is trained whose gradient goes through the model."""
    read = [str(node.target) for node in ancestors(stack.end) if node.op == "get_attr"]
    trained = [name for name in read if _is_trained(editor.state[name])]
    if trained:
        shown = ", ".join(sorted(trained)[:4])
        raise ModelError(
            f"{len(trained)} parameters in front of the mix would be trained through the model "
            f"({shown})",
            fix="Let `also_train` name layers behind the mix alone, whose weights no layer in "
            "front of it shares.",
        )


def _is_trained(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


@dataclass
class _Side:
    """The side network of a program that is edited.

    Attributes:
        parts: names of its tensors, by their part.
        at: node in front of which the next call goes.
        made: its calls so far.
    """

    editor: Editor
    options: SideNetworkOptions
    context: Context
    width: int
    dtype: torch.dtype
    parts: dict[str, str] = field(default_factory=dict)
    at: fx.Node | None = None
    made: list[fx.Node] = field(default_factory=list)

    def build(self, stack: Stack) -> None:
        first = stack.blocks[0]
        # behind the first block's nodes: what it reads from outside is there
        self._behind(first.result)
        state = self._down(0, first.source)
        for index, block in enumerate(stack.blocks):
            self._behind(block.result)
            low = self._down(index, block.result)
            gate = self._call(aten.sigmoid.default, self._store(f"{index}.gate", self._gate()))
            # (1 - z) d + z s, as d + z (s - d)
            moved = self._call(aten.mul.Tensor, self._call(aten.sub.Tensor, state, low), gate)
            mixed = self._call(aten.add.Tensor, low, moved)
            state = self._copy(index, block, mixed)
        self._behind(stack.end)
        if stack.tail:
            narrow = self._narrow("norm")
            state = narrow.copy(
                stack.tail, stack.blocks[-1].result, state, stack.end,
                lambda old: f"norm.{_last_parts(old, '')}", self.editor.state,
            )  # fmt: skip
        self._mix(stack, state)

    def _mix(self, stack: Stack, state: fx.Node) -> None:
        editor, width = self.editor, self.width
        narrow = width // self.options.reduction
        is_convex = self.options.mix == "convex"
        start = (drawn(width, narrow, self.context.generator("up")) if is_convex
                 else torch.zeros(width, narrow))  # fmt: skip
        up = self._call(
            aten.linear.default, state, self._store("up", start),
            self._store("up_bias", torch.zeros(width)),
        )  # fmt: skip
        share = self._store("mix", torch.ones(width))
        end = stack.end
        own = end
        if is_convex:
            own = self._call(aten.mul.Tensor, end, share)
            share = self._call(aten.rsub.Scalar, share, 1)
        result = self._call(aten.add.Tensor, own, self._call(aten.mul.Tensor, up, share))
        made = set(self.made)
        for reader in list(end.users):
            if reader not in made:
                reader.replace_input_with(end, result)
        editor.changed = True

    # ---- parts

    def _down(self, index: int, x: fx.Node) -> fx.Node:
        def store(part: str, values: Tensor) -> fx.Node:
            return self._store(f"{index}.down.{part}", values)

        return downsampled(
            self.options.downsample, x, self.options.reduction, self.options.rank, self._call,
            store, self.context.generator(f"down.{index}"),
        )  # fmt: skip

    def _copy(self, index: int, block: Block, mixed: fx.Node) -> fx.Node:
        return self._narrow(block.name).copy(
            block.nodes, block.source, mixed, block.result,
            lambda old: f"{index}.{_last_parts(old, block.name)}", self.editor.state,
        )  # fmt: skip

    def _narrow(self, name: str) -> Narrow:
        return Narrow(self.options.reduction, self._call, self._store, self.context.generator(name))

    def _gate(self) -> Tensor:
        return torch.full((self.width // self.options.reduction,), GATE)

    # ---- nodes and tensors

    def _behind(self, node: fx.Node) -> None:
        """Lets further calls go behind `node` and those made so far."""
        order = {n: i for i, n in enumerate(self.editor.graph.nodes)}
        last = max([node, *self.made[-1:]], key=order.__getitem__)
        after = last.next
        while after.op in ("placeholder", "get_attr"):
            after = after.next
        self.at = after

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        assert self.at is not None
        node = self.editor.call(target, *args, before=self.at, **kwargs)
        set_gw_meta(node, adapter=self.options.name)
        self.made.append(node)
        return node

    def _store(self, part: str, values: Tensor) -> fx.Node:
        if part not in self.parts:
            parameter = nn.Parameter(values.to(self.dtype).contiguous())
            name = f"{self.options.name}.{part}"
            self.parts[part] = self.editor.add_state(name, parameter)
        return self.editor.get(self.parts[part])


def _last_parts(old: str, block: str) -> str:
    """Name of a copied parameter: the old one without its block; codes of a weight are a weight."""
    module, _, name = old.removeprefix(f"{block}.").rpartition(".")
    name = "weight" if name.startswith("weight") else name
    return f"{module}.{name}" if module else name
