"""Builds an ONNX graph: nodes, constants, weights, and the run-time sizes of dynamic dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import sympy
import torch
from onnx_ir import tensor_adapters
from torch import fx

from graphwright.backends.onnxruntime.numbers import NoFormError, number, truth, whole
from graphwright.ir.graph.sizes import expression as expression
from graphwright.ir.graph.sizes import sizes_of as sizes_of

MICROSOFT = "com.microsoft"
STATE_KEY = "graphwright.state"
"""Metadata key of an initializer: the name of the program's tensor that it holds."""


class Untranslatable(Exception):
    """A node that this translator has no exact ONNX form for."""

    def __init__(self, node: fx.Node, why: str) -> None:
        self.node = node
        self.why = why
        super().__init__(f"{node.name} ({node.target}): {why}")


def onnx_dtype(dtype: torch.dtype) -> ir.DataType:
    """ONNX element type of a torch dtype."""
    return tensor_adapters.from_torch_dtype(dtype)


class Emitter:
    """Collects the nodes of one ONNX graph.

    Attributes:
        values: FX node to its ONNX value (a list of values for an op with several results).
        opset: version of the standard operator set.
        dims: sympy symbol to the name of the dynamic dimension.
        numbers: sympy symbol of a number that was read out of a tensor, to the float64 value.
    """

    def __init__(
        self, state: Mapping[str, torch.Tensor], dims: Mapping[Any, str], opset: int
    ) -> None:
        self.state = state
        self.dims = dims
        self.opset = opset
        self.values: dict[fx.Node, Any] = {}
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.domains: dict[str, int] = {"": opset}
        self.functions: list[ir.Function] = []
        self._constants: dict[Any, ir.Value] = {}
        self._sizes: dict[Any, ir.Value] = {}
        self._places: dict[Any, tuple[ir.Value, int]] = {}
        self.numbers: dict[Any, ir.Value] = {}
        self._names: dict[str, int] = {}
        self._node: fx.Node | None = None

    # ---- nodes

    def begin(self, node: fx.Node) -> None:
        """From here on, new values are named after this FX node."""
        self._node = node

    def name(self, stem: str) -> str:
        """A value name that is still free."""
        count = self._names.get(stem, 0)
        self._names[stem] = count + 1
        return stem if count == 0 else f"{stem}_{count}"

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> Any:
        """Adds a node with one output and returns the output; a None input is left out."""
        return self.multi(kind, 1, *inputs, domain=domain, **attributes)[0]

    def multi(
        self, kind: str, count: int, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        """Adds a node with `count` outputs and returns them. None attributes are left out."""
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        stem = f"{self._node.name if self._node else 'graph'}.{kind}"
        outputs = [ir.Value(name=self.name(stem)) for _ in range(count)]
        kept = {key: value for key, value in attributes.items() if value is not None}
        node = ir.node(kind, given, kept, domain=domain, outputs=outputs, name=outputs[0].name)
        if domain:
            self.domains.setdefault(domain, 1)
        self.nodes.append(node)
        return outputs

    def typed(self, value: ir.Value, node: fx.Node) -> ir.Value:
        """Records the FX node's shape and dtype on its ONNX value."""
        fake = node.meta.get("val")
        if isinstance(fake, torch.Tensor) and value.shape is None:
            value.shape = ir.Shape(self.shape_names(fake.shape))
            value.type = ir.TensorType(onnx_dtype(fake.dtype))
        return value

    def shape_names(self, shape: Sequence[Any]) -> list[int | str]:
        """A shape with dynamic sizes as text, in the user's dimension names."""
        names = {symbol: sympy.Symbol(name) for symbol, name in self.dims.items()}
        found = [expression(size) for size in shape]
        return [s if isinstance(s, int) else str(s.xreplace(names)) for s in found]

    # ---- constants and weights

    def constant(self, value: Any, dtype: torch.dtype) -> ir.Value:
        """A constant scalar or nested list as an initializer, shared between equal ones."""
        key = (repr(value), dtype)
        if key not in self._constants:
            tensor = torch.tensor(value, dtype=dtype)
            self._constants[key] = self._initializer(self.name("constant"), tensor)
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """A 1-D int64 constant."""
        return self.constant([int(v) for v in values], torch.int64)

    def weight(self, name: str, form: str = "") -> ir.Value:
        """A tensor of the program as an initializer.

        Args:
            name: its name in the program's state.
            form: empty, or `transposed` (last two axes swapped), kept under `name.transposed`.
        """
        full = f"{name}.{form}" if form else name
        if full not in self.initializers:
            tensor = self.state[name].detach()
            if form == "transposed":
                tensor = tensor.transpose(-1, -2)
            self._initializer(full, tensor.contiguous()).metadata_props[STATE_KEY] = name
        return self.initializers[full]

    def packed_weight(self, name: str, bits: int, *shape: int) -> ir.Value:
        """Bytes of the program as an initializer of unsigned integers of 4 or 8 bits.

        Args:
            name: of a uint8 tensor in the state; two 4-bit values a byte, the first one low.
            bits: 4 or 8.
            shape: of the initializer.
        """
        data = self.state[name].numpy()
        tensor: Any
        if bits == 4:
            tensor = ir.PackedTensor(data, ir.DataType.UINT4, shape=ir.Shape(shape), name=name)
        else:
            tensor = ir.Tensor(data.reshape(shape), name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        value.metadata_props[STATE_KEY] = name
        self.initializers[name] = value
        self._names.setdefault(name, 1)
        return value

    def derived(self, name: str, tensor: torch.Tensor) -> ir.Value:
        """A tensor computed from the program's, as an initializer under a name of its own."""
        return self._initializer(self.name(name), tensor.detach().contiguous())

    def weight_like(self, value: float, sizes: list[int], dtype: torch.dtype) -> ir.Value:
        """A constant filled with one number (the scale of a norm without weight, say)."""
        key = (value, tuple(sizes), dtype)
        if key not in self._constants:
            name = self.name("constant")
            self._constants[key] = self._initializer(name, torch.full(sizes, value, dtype=dtype))
        return self._constants[key]

    def adopt(self, nodes: Sequence[ir.Node], constants: Sequence[ir.Value]) -> None:
        """Takes over nodes made elsewhere, with the constants they read; gives them free names."""
        for value in constants:
            value.name = self.name("constant")
            self.initializers[value.name] = value
        for made in nodes:
            for output in made.outputs:
                output.name = self.name(
                    f"{self._node.name if self._node else 'graph'}.{made.op_type}"
                )
            made.name = made.outputs[0].name
            if made.domain:
                self.domains.setdefault(made.domain, made.version or 1)
            self.nodes.append(made)

    def _initializer(self, name: str, tensor: torch.Tensor) -> ir.Value:
        data = tensor_adapters.TorchTensor(tensor, name=name)
        value = ir.Value(name=name, shape=data.shape, type=ir.TensorType(data.dtype))
        value.const_value = data
        self.initializers[name] = value
        self._names.setdefault(name, 1)
        return value

    # ---- arguments

    def tensor(self, arg: Any, dtype: torch.dtype | None = None) -> ir.Value:
        """An argument as a tensor value, cast to `dtype` when it has another.

        Args:
            arg: an FX node, or a Python number (then a constant without axes).
            dtype: wanted dtype; needed for numbers.
        """
        if not isinstance(arg, fx.Node):
            assert dtype is not None
            if isinstance(arg, torch.SymInt):
                return self.cast(self.op("Squeeze", self.size(arg)), torch.int64, dtype)
            if isinstance(arg, torch.SymFloat | torch.SymBool):
                return self._computed(arg, dtype)
            return self.constant(arg, dtype)
        fake = arg.meta.get("val")
        if isinstance(fake, torch.Tensor):
            return self.cast(self.values[arg], fake.dtype, dtype)
        if isinstance(fake, torch.SymInt):
            scalar = self.op("Squeeze", self.size(fake))
            return self.cast(scalar, torch.int64, dtype)
        if isinstance(fake, torch.SymFloat | torch.SymBool):
            return self._computed(fake, dtype)
        if isinstance(fake, int | float | bool) and dtype is not None:
            return self.constant(fake, dtype)
        raise Untranslatable(arg, f"a {type(fake).__name__} is used as a tensor")

    def _computed(
        self, fake: torch.SymFloat | torch.SymBool, dtype: torch.dtype | None
    ) -> ir.Value:
        """A fraction or a condition computed from sizes, as a value without axes."""
        assert self._node is not None
        is_float = isinstance(fake, torch.SymFloat)
        try:
            value = (number if is_float else truth)(self, fake.node.expr)
        except NoFormError as error:
            raise Untranslatable(self._node, f"no ONNX form for the number {error}") from error
        have = torch.float64 if is_float else torch.bool
        return self.cast(self.op("Squeeze", value), have, dtype)

    def cast(self, value: ir.Value, have: torch.dtype, want: torch.dtype | None) -> ir.Value:
        """`value` in the wanted dtype."""
        if want is None or want == have:
            return value
        cast: ir.Value = self.op("Cast", value, to=int(onnx_dtype(want)))
        return cast

    # ---- sizes

    def place(self, node: fx.Node, value: ir.Value) -> None:
        """Remembers where sizes can be read at run time: the first tensor that has each."""
        for axis, size in enumerate(sizes_of(node)):
            if not isinstance(size, int):
                self._places.setdefault(size, (value, axis))

    def place_number(self, node: fx.Node, value: ir.Value, dtype: torch.dtype) -> None:
        """Remembers the number that a node reads out of a tensor with one element."""
        fake = node.meta["val"]
        flat = self.op("Reshape", value, self.ints(1))
        if isinstance(fake, torch.SymInt):
            self._sizes[fake.node.expr] = self.cast(flat, dtype, torch.int64)
        elif isinstance(fake, torch.SymFloat):
            self.numbers[fake.node.expr] = self.cast(flat, dtype, torch.float64)

    def let(self, size: Any, value: ir.Value) -> None:
        """Where a size is read from here on: a 1-D int64 value with one element."""
        self._sizes[size] = value

    def size(self, size: Any) -> ir.Value:
        """A size as a 1-D int64 value with one element."""
        expr = expression(size)
        if isinstance(expr, int):
            return self.ints(expr)
        if expr not in self._sizes:
            self._sizes[expr] = self._compute_size(expr)
        return self._sizes[expr]

    def _compute_size(self, expr: Any) -> ir.Value:
        if expr in self._places:
            value, axis = self._places[expr]
            return self.op("Shape", value, start=axis, end=axis + 1)  # type: ignore[no-any-return]
        if isinstance(expr, sympy.Integer):
            return self.ints(int(expr))
        try:
            return whole(self, expr)
        except NoFormError as error:
            assert self._node is not None
            raise Untranslatable(self._node, f"no ONNX form for the size {error}") from error

    def size_of(self, expr: Any) -> ir.Value:
        """As `size`, for a sympy expression."""
        if expr.is_Integer:
            return self.ints(int(expr))
        if expr not in self._sizes:
            self._sizes[expr] = self._compute_size(expr)
        return self._sizes[expr]

    def index(self, arg: Any) -> ir.Value:
        """An int argument (number, SymInt or FX node) as a 1-D value with one element."""
        if isinstance(arg, fx.Node):
            fake = arg.meta["val"]
            if isinstance(fake, torch.Tensor):
                return self.op("Reshape", self.tensor(arg, torch.int64), self.ints(1))  # type: ignore[no-any-return]
            return self.size(fake)
        return self.size(arg)

    def shape(self, sizes: Sequence[Any]) -> ir.Value:
        """Sizes as one 1-D int64 value; a constant when all are."""
        found = [s if isinstance(s, sympy.Basic) else expression(s) for s in sizes]
        if all(isinstance(s, int) for s in found):
            return self.ints(*found)
        parts: list[ir.Value] = []
        run: list[int] = []
        for size in found:
            if isinstance(size, int):
                run.append(size)
                continue
            if run:
                parts.append(self.ints(*run))
                run = []
            parts.append(self.size_of(size))
        if run:
            parts.append(self.ints(*run))
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def reshape(self, value: ir.Value, have: Sequence[Any], want: Sequence[Any]) -> ir.Value:
        """Reshape between two known shapes; written as a constant wherever it can be.

        Args:
            value: the tensor.
            have: its sizes, as ints and expressions.
            want: the sizes wanted, likewise; same number of elements.
        """
        if list(have) == list(want):
            return value
        if any(s == 0 for s in [*have, *want] if isinstance(s, int)):
            return self.op("Reshape", value, self.shape(want), allowzero=1)  # type: ignore[no-any-return]
        spec: list[Any] = []
        for axis, size in enumerate(want):
            is_copy = not isinstance(size, int) and axis < len(have) and have[axis] == size
            spec.append(0 if is_copy else size)
        open_axes = [i for i, s in enumerate(spec) if not isinstance(s, int)]
        if open_axes:
            # The dynamic size that is dearest to compute is left for the runtime to infer.
            axis = next((i for i in open_axes if spec[i] not in self._sizes), open_axes[-1])
            spec[axis] = -1
        return self.op("Reshape", value, self.shape(spec))  # type: ignore[no-any-return]
