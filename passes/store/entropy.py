"""store.entropy: integer weights in files as an entropy coder's streams, bit by bit the same."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from graphwright.ir.edit import Editor
from graphwright.ir.errors import ModelError
from graphwright.ir.files.entropy.stream import FACT, coded, refusal
from graphwright.ir.options import Options
from graphwright.ir.program import Program
from graphwright.passes.base import Action, Context, Contract, Effect, Pass, Result

LITTLE = 0.02
"""A share of the codes' bytes: the report says it where less than this is saved."""


class EntropyOptions(Options):
    """Options of store.entropy."""

    latent: Annotated[int, Field(ge=1, le=64)] = 8
    """Most states of the hidden variable of a row, its type; every tensor gets the power of two
    that needs the fewest bytes, tables counted."""

    smallest: Annotated[int, Field(ge=1)] = 4096
    """Bytes of the smallest tensor that is coded: tables take a byte per symbol and row type."""


class Entropy(Pass[EntropyOptions]):
    """Writes codes of weights to files as an entropy coder's streams, and reads the same bits back.

    The rows of a tensor (output channels) are samples of a probabilistic circuit: a sum over hidden
    row types of products of one categorical per code. It is fitted to the tensor by expectation
    maximization; a range coder then codes each code with its exact conditional given the row so
    far. All the circuit is to the coder are whole numbers that are stored with the stream, so that
    every machine decodes alike; checksums of the stream and of the tensor tell damage.

    The program stays as it is: what changes is how it is saved (`program.pt2`, artifacts of the
    triton backend). ONNX files keep their fixed width, for ONNX Runtime reads no such streams.
    Torch's own reader refuses the file.

    There is little to gain where every row or block has a scale of its own, and the report says how
    little: codes of Gaussian weights with a scale per row hold about 3.1 of 4 bits and 7.3 of 8, of
    which an order-0 code gets all; row types help where rows of unlike spread share a scale. Floats
    and small tensors are left as they are.

    Source: Liu et al. 2022, "Lossless Compression with Probabilistic Circuits" (P07), with the
    smallest useful circuit: one latent variable per row, whose leaves are shared by all columns,
    for tables per column would take more than they save. A type's posterior is updated as symbols
    are read, which is their evaluation of the units whose scope has changed.
    """

    papers = ("P07",)
    contract: ClassVar[Contract] = "exact"
    tolerance: ClassVar[float] = 0
    weights: ClassVar[Effect | None] = "kept"
    after = ("*",)

    def run(self, program: Program, context: Context) -> Result:
        """Codes every tensor once, to report its size, and leaves the record for saving.

        Raises:
            ModelError: the program holds no integer tensor that can be coded.
        """
        actions, before, after, order0 = [], 0, 0, 0.0
        whole = {n: t for n, t in program.state.items() if not t.dtype.is_floating_point}
        for index, (name, tensor) in enumerate(whole.items()):
            context.progress("coding", index, len(whole))
            values = tensor.detach().cpu().numpy()
            if reason := refusal(values, self.options.smallest):
                actions.append(Action.left(name, reason))
                continue
            found = coded(values, self.options.latent)
            before += values.nbytes
            if found is None:
                after, order0 = after + values.nbytes, order0 + values.nbytes
                actions.append(Action.left(name, "no stream is smaller, or it is all but constant"))
                continue
            after, order0 = after + len(found.stream), order0 + found.entropy * found.codes / 8
            actions.append(Action(name, _said(found.bits, found.entropy, found.width, found.types)))
        if not before:
            raise ModelError(
                f"{self.id}: no integer weights to code",
                fix="Put a pass that makes codes in front (quantize.int8, quantize.rtn, ...).",
                details=tuple(f"{a.layer}: {a.reason}" for a in actions[:5]),
            )
        metrics = {"bytes_before": float(before), "bytes_after": float(after),
                   "bytes_order_0": order0}  # fmt: skip
        editor = Editor(program, by=self.id)
        editor.facts[FACT] = self.resolved_options()
        editor.changed = True
        return Result(editor.finish(), tuple(actions), metrics, warnings=_warnings(before, after))


def _said(bits: float, entropy: float, width: int, types: int) -> str:
    kinds = "1 row type" if types == 1 else f"{types} row types"
    return f"{bits:.3f} bits a code of {width}, order-0 entropy {entropy:.3f}, {kinds}"


def _warnings(before: int, after: int) -> tuple[str, ...]:
    saved = 1 - after / before
    if saved >= LITTLE:
        return ()
    return (f"coding saves {saved:.1%} of the codes' {before} bytes: there is hardly anything to "
            "gain on this program",)  # fmt: skip
