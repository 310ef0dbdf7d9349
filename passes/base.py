"""The base class of passes: it declares options, needs and contract, and runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, cast, get_args, get_origin

from pydantic import ValidationError
from typing_extensions import TypeVar

from graphwright.ir.action import Action
from graphwright.ir.check.promise import EXACT, Promise
from graphwright.ir.context import Batch, Context
from graphwright.ir.errors import ArgumentError, ContractError
from graphwright.ir.graph.writes import Writes
from graphwright.ir.options import EVERY_DTYPE, Options
from graphwright.ir.program import Program, Provenance
from graphwright.ir.work import BACKWARD, FORWARD, Load, Work
from graphwright.passes.registry import all_passes, find_pass, register

Contract = Literal["exact", "identity_at_init", "lossy"]
Need = Literal["nothing", "calibration", "gradients", "training"]
Effect = Literal["kept", "reformed", "compressed", "trained"]
"""The effect on weights: the same values; new originals (norms folded, factors moved, channels
cut); approximations of what they were; values found by training."""

MOST_NAMED = 4
"""Tensors that a message names."""

WeightKind = Literal["linear", "conv", "grouped_conv", "embedding"]
"""Kinds of layers as far as orders of passes depend on them."""

MATRICES: tuple[WeightKind, ...] = ("linear", "conv", "grouped_conv")
WEIGHTS: tuple[WeightKind, ...] = (*MATRICES, "embedding")

OptionsT = TypeVar("OptionsT", bound=Options, default=Options)

__all__ = ["Action", "Context", "Contract", "Need", "Options", "Pass", "Result", "all_passes",
           "find_pass", "register"]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """The result of a pass.

    Attributes:
        program: the new program, or the very same object when nothing changed.
        actions: one entry per layer it looked at; nothing is silently left alone.
        metrics: figures worth a row in the report, by name.
        uncompressed: the program whose weights were compressed, where that is not the one that
            was given but one of another form (weights multiplied by factors first).
        effect: what became of the weights, where that is not what the pass declares.
        warnings: what a user should know before trusting the result, a sentence each.
    """

    program: Program
    actions: tuple[Action, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    uncompressed: Program | None = None
    effect: Effect | None = None
    warnings: tuple[str, ...] = ()


class Pass(Generic[OptionsT]):
    """A transformation of a program.

    A subclass in `passes/<family>/<method>.py` gets the id `<family>.<method>`; one of your own
    gets its id from `@gw.register("family.method")`. An instance holds only frozen options, of
    the type that the base names: `class Rtn(Pass[RtnOptions])`.

    Class attributes:
        Options: the options it takes, a pydantic model; taken from the base.
        contract: `exact` (same function up to rounding), `identity_at_init` (same function until
            trained) or `lossy` (changes it by a measured amount).
        needs: `nothing`, `calibration`, `gradients` or `training`.
        needs_with: what it needs instead when an option has a value, by (option, value).
        tolerance: for the first two contracts, the largest relative error ||a-b||/||a|| that
            still counts as equal, in float64 (numbers that the pass stored anew are allowed the
            rounding of the program's own precision besides). 0 asks for equal values in the
            program's own precision.
        papers: ids of the papers it implements.
        after: ids or family globs that must not come later in a chain.
        before: ids or family globs that must not come earlier. Where two passes disagree, an id
            outweighs a glob, and two globs leave the order free.
        conflicts: ids or family globs that cannot be in the same chain.
        behind: ids or family globs, one of which has to come earlier in a chain; `!` excludes, and
            `family.method[option]` asks for one that has the option.
        takes: kinds of layers whose float weights it works on, where it can do nothing else.
        codes: kinds of layers whose weights are codes behind it, all that it selects. A pass
            behind it that takes no others, of the same layers, has nothing left to do.
        lowers_to: backends that can lower its result.
        weights: its effect on weights. Compensation later in a chain compares compressed weights
            with those that compression started from. Where absent: `trained` for a pass that
            trains, `compressed` for a lossy one, else `kept`.
        changes_interface: its result may have other inputs or outputs than the given program.
        restates: its result is another function, with outputs of its own, that `expected` computes
            out of runs of the given one; held to that in float64.
        stores_weights: weights that plain operators compute from stored tensors (weight norm,
            spectral norm) are stored before it runs.
        computes_in: floating-point dtypes of the programs it takes.
        stored_bits: least bits in which a file behind it holds an element of the weight of a
            linear layer or convolution, a number or the option that says it. None where elements
            may be left out, or nothing is known. A search proves by it how small files can get.
    """

    id: ClassVar[str] = ""
    Options: ClassVar[type[Options]] = Options
    contract: ClassVar[Contract] = "exact"
    needs: ClassVar[Need] = "nothing"
    needs_with: ClassVar[Mapping[tuple[str, Any], Need]] = {}
    tolerance: ClassVar[float] = EXACT
    papers: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()
    conflicts: ClassVar[tuple[str, ...]] = ()
    behind: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[WeightKind, ...]] = ()
    codes: ClassVar[tuple[WeightKind, ...]] = ()
    lowers_to: ClassVar[tuple[str, ...]] = ("onnxruntime", "triton")
    weights: ClassVar[Effect | None] = None
    changes_interface: ClassVar[bool] = False
    restates: ClassVar[bool] = False
    stores_weights: ClassVar[bool] = False
    computes_in: ClassVar[tuple[str, ...]] = EVERY_DTYPE
    stored_bits: ClassVar[int | str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        package, _, method = cls.__module__.rpartition(".")
        if package.startswith("graphwright.passes."):
            cls.id = f"{package.rpartition('.')[2]}.{method}"
        for base in getattr(cls, "__orig_bases__", ()):
            origin, given = get_origin(base), get_args(base)
            is_pass = isinstance(origin, type) and issubclass(origin, Pass)
            if is_pass and isinstance(given[0], type):
                cls.Options = given[0]

    def __init__(self, **options: Any) -> None:
        try:
            made = self.Options.from_plain(options)
        except ValidationError as error:
            raise ArgumentError(_readable(self.id or type(self).__name__, error)) from None
        except TypeError as error:
            raise ArgumentError(f"{self.id}: an option is not plain data: {error}") from None
        self.options = cast(OptionsT, made)

    def run(self, program: Program, context: Context) -> Result:
        """Transforms `program`; the arithmetic of the pass."""
        raise TypeError(f"{type(self).__name__} defines no run(program, context)")

    def __call__(
        self,
        program: Program,
        *,
        calibration: Iterable[Batch] | None = None,
        training: Iterable[Any] | None = None,
        teacher: Program | None = None,
        seed: int = 0,
        check: bool = True,
    ) -> Program:
        """Runs the pass, checks its contract, and records it.

        The programs before and after are compared on the example inputs, and on random ones: a
        single sample, and far more.

        Args:
            program: left as it is.
            calibration: re-iterable batches, for passes that need them.
            training: re-iterable batches with labels, for passes that train.
            teacher: program that a pass trains `program` to follow; `program` itself when absent.
            seed: seed of the pass's random streams.
            check: compare the results before and after, as the contract asks.

        Raises:
            ContractError: the pass changed the function more than its contract allows.
            ArgumentError: it needs calibration or training data and got none.
        """
        context = Context(
            seed=seed,
            calibration=calibration,
            training=training,
            teacher=teacher or program,
            scope=(self.id,),
        )
        result = self.execute(program, context)
        for text in result.warnings:
            warnings.warn(f"{self.id}: {text}", stacklevel=2)
        if check:
            from graphwright.ir.check.verify import check_contract
            from graphwright.ir.data.synthetic import other_size_inputs

            others = other_size_inputs(program, seed)
            check_contract(program, result.program, self.promise(), others=others)
        return result.program

    def execute(self, program: Program, context: Context) -> Result:
        """Runs the pass and adds its provenance; no check of the contract by numbers.

        Raises:
            ContractError: the pass wrote into a tensor that it was given, or changed inputs,
                outputs, free sizes or examples without declaring it.
            ArgumentError: it needs calibration or training data and got none.
        """
        if self.needed != "nothing":
            source = "training" if self.needed == "training" else "calibration"
            context.require(source, f"{self.id} needs {source} data")
        writes = Writes(p for p in (program, context.teacher, context.uncompressed) if p)
        result = (
            self._run_on_stored(program, context)
            if self.stores_weights
            else self.run(program, context)
        )
        from graphwright.ir.check.interface import check_interface
        from graphwright.ir.graph.arrange import arranged
        from graphwright.ir.graph.digest import digest

        written = writes.found()
        if written:
            raise ContractError(
                f"{self.id} wrote into {', '.join(written[:MOST_NAMED])} of the program that it "
                "was given",
                fix="A pass makes new tensors (`Editor.set_state`), for others share these.",
            )
        if not (self.changes_interface or self.restates):
            check_interface(program, result.program, self.id)
        record = Provenance(
            self.id, self.resolved_options(), context.seed, self.contract, digest(program)
        )
        changed = result.program.replace(provenance=(*program.provenance, record))
        if result.program.graph is not program.graph:
            changed = arranged(changed)
        before = result.uncompressed
        return replace(
            result, program=changed, uncompressed=None if before is None else arranged(before)
        )

    def _run_on_stored(self, program: Program, context: Context) -> Result:
        from graphwright.ir.stored.parametrized import store_weights

        stored, names = store_weights(program, self.id)
        result = self.run(stored, context)
        said = tuple(Action(n, "weight stored", "it was computed from parameters") for n in names)
        return replace(result, actions=(*said, *result.actions))

    def cost(self, load: Load) -> Work:
        """The work of a run, counted from shapes, for estimates (`optimize --plan`).

        What a pass of its needs does: it writes the weights that it targets anew; with calibration
        it runs the data forward, for gradients backward too, and trains as `tune` says. A pass
        that does far more adds that to what this gives.

        Args:
            load: sizes of the model and of the data.
        """
        layers = load.targeted(getattr(self.options, "targets", None) or ("*",))
        work = load.rewritten(layers)
        if self.needed == "calibration":
            work += load.forward(load.calibration)
        elif self.needed == "gradients":
            work += load.forward(load.calibration).times(FORWARD + BACKWARD)
        elif self.needed == "training":
            work += load.training_steps(getattr(self.options, "tune", None), load.training)
        return work

    def effect(self, result: Result) -> Effect:
        """The effect of a run on weights: as its result says, or as the pass declares."""
        declared = result.effect or self.weights
        if declared == "reformed" and not any(action.changed for action in result.actions):
            return "kept"
        if declared is not None:
            return declared
        if self.needed == "training":
            return "trained"
        return "compressed" if self.contract == "lossy" else "kept"

    def promise(self) -> Promise:
        """The promise of this pass, with these options, about its effect on the function."""
        bound = getattr(self.options, "max_error", None)
        expected = self.expected if self.restates else None
        return Promise(
            self.id, self.contract, self.tolerance, bound, self.changes_interface, expected
        )

    def expected(
        self,
        after: Program,
        run: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        given: Mapping[str, Any],
    ) -> Mapping[str, Any]:
        """Of a pass that `restates`: the outputs that its result has to have.

        Args:
            after: the result.
            run: the program before, by names of inputs and outputs.
            given: inputs of the result by name.
        """
        raise TypeError(f"{type(self).__name__} restates the program and does not say as what")

    @property
    def needed(self) -> Need:
        """The needs of this instance, given its options."""
        for (option, value), need in self.needs_with.items():
            if getattr(self.options, option) == value:
                return need
        return self.needs

    def resolved_options(self) -> dict[str, Any]:
        """All options with their defaults, as plain data."""
        return dict(self.options.model_dump(mode="json"))

    def __repr__(self) -> str:
        given = ", ".join(f"{k}={v!r}" for k, v in self.options.model_dump().items())
        return f"{type(self).__name__}({given})"


def _readable(name: str, error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"])
        if place:
            lines.append(f"{place}: {item['msg']} (got {item['input']!r})")
        else:  # a rule between options
            lines.append(item["msg"].removeprefix("Value error, "))
    return f"{name}: " + "; ".join(lines)
