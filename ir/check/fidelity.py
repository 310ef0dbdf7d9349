"""The distance between two sets of outputs, accumulated in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 20  # elements turned into float64 at a time: 8 MiB per operand


@dataclass(frozen=True)
class Fidelity:
    """Distance between a reference `a` and a candidate `b`, as sums that add up over batches.

    All values of all outputs (and all merged batches) count as one long vector. Positions where
    both hold the same infinity, or both NaN, agree and are left out (a causal mask's -inf); any
    other non-finite value is `broken`, and makes every figure say so. Where nothing is left to
    compare, the comparison is `blank`: no figure has a value, and none of them says "equal".

    Attributes:
        max_abs: largest |a - b|, in the outputs' own unit; inf when something is broken.
        reference_energy: sum of a². candidate_energy: sum of b². error_energy: sum of (a - b)².
        dot: sum of a * b.
        elements: pairs of finite values compared.
        skipped: positions where both hold the same value that is not finite.
        broken: values that are not finite on one side only, or outputs that cannot be compared.
        worst: path of the output that holds `max_abs`, as `logits` or `0.1`.
        notes: what a reader must know to trust the figures, in words.
    """

    max_abs: float = 0.0
    reference_energy: float = 0.0
    candidate_energy: float = 0.0
    error_energy: float = 0.0
    dot: float = 0.0
    elements: int = 0
    skipped: int = 0
    broken: int = 0
    worst: str = ""
    notes: tuple[str, ...] = ()

    @property
    def blank(self) -> bool:
        """No finite value was compared, and nothing contradicts: there is no figure to give."""
        return self.elements == 0 and not self.broken

    @property
    def wiped(self) -> bool:
        """The candidate is all zeros, and the reference is not."""
        return self.candidate_energy == 0.0 < self.reference_energy

    def within(self, bound: float) -> bool:
        """Whether nothing that was compared is further apart than `bound`, relative.

        True of a blank comparison, which contradicts nothing: whoever needs more than that asks
        for `blank` as well.
        """
        return not self.broken and (self.blank or self.relative <= bound)

    @property
    def relative(self) -> float:
        """||a - b|| / ||a||. 0 when both are all zero; inf when only the reference is; NaN when
        blank."""
        if self.broken:
            return math.inf
        if self.blank:
            return math.nan
        if self.reference_energy == 0.0:
            return 0.0 if self.error_energy == 0.0 else math.inf
        return math.sqrt(self.error_energy / self.reference_energy)

    @property
    def cosine(self) -> float:
        """a.b / (||a|| ||b||). 1 when both are all zero; 0 when one is; NaN when broken or
        blank."""
        if self.broken or self.blank:
            return math.nan
        if self.error_energy == 0.0:
            return 1.0
        norms = math.sqrt(self.reference_energy) * math.sqrt(self.candidate_energy)
        return max(-1.0, min(1.0, self.dot / norms)) if norms > 0.0 else 0.0

    @property
    def snr_db(self) -> float:
        """10 log10(||a||² / ||a - b||²), in dB. inf when equal; -inf for a zero reference; NaN when
        blank."""
        if self.broken:
            return -math.inf
        if self.blank:
            return math.nan
        if self.error_energy == 0.0:
            return math.inf
        if self.reference_energy == 0.0:
            return -math.inf
        return 10.0 * math.log10(self.reference_energy / self.error_energy)

    @property
    def is_exact(self) -> bool:
        """Every value compared is equal, and at least one was compared."""
        return self.broken == 0 and self.elements > 0 and self.max_abs == 0.0

    def as_dict(self) -> dict[str, float | None]:
        """The four figures for JSON; one that is not finite is None, and all are when blank.

        `snr_db: None` means no error at all when `max_abs` is 0, and beyond repair otherwise.
        """
        figures = {
            "max_abs": math.nan if self.blank else self.max_abs,
            "relative": self.relative,
            "cosine": self.cosine,
            "snr_db": self.snr_db,
        }
        return {name: value if math.isfinite(value) else None for name, value in figures.items()}

    def __str__(self) -> str:
        if self.blank:
            return "; ".join(self.notes) or _NOTHING
        figures = f"max |a-b| {self.max_abs:.3g}, relative {self.relative:.3g}"
        if self.broken:
            return f"{figures} ({'; '.join(self.notes)})"
        return f"{figures}, cosine {self.cosine:.6f}, SNR {self.snr_db:.1f} dB"


def compare(reference: Any, candidate: Any) -> Fidelity:
    """Fidelity of `candidate` to `reference`.

    Both are tensors, arrays or numbers, or the same nest of mappings, lists, tuples. Different
    dtypes are compared by value and noted; a different shape or structure is `broken`, not an
    exception, so that a caller can say which pass did it. Works through one tensor at a time in
    chunks: no second copy of all outputs is made. Integers beyond 2**53 are rounded.
    """
    left, right = dict(leaves(reference)), dict(leaves(candidate))
    total = Fidelity()
    if list(left) != list(right):
        missing = [path for path in left if path not in right]
        extra = [path for path in right if path not in left]
        total = _broken(f"outputs differ in structure: missing {missing}, unexpected {extra}")
    for path, a in left.items():
        if path in right:
            total = _add(total, _compare_tensors(path, a, right[path]))
    return _with_notes(total)


def merge(parts: Iterable[Fidelity]) -> Fidelity:
    """Fidelity over all of `parts`, as if their outputs had been compared in one piece."""
    total = Fidelity()
    for part in parts:
        total = _add(total, part)
    return _with_notes(total)


def has_finite(outputs: Any) -> bool:
    """Whether there is a finite value anywhere in a nest."""
    return any(bool(tensor.isfinite().any()) for _, tensor in leaves(outputs))


def leaves(outputs: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of every tensor, array or number in a nest; None and text are skipped."""
    if isinstance(outputs, Mapping):
        children = [(str(key), value) for key, value in outputs.items()]
    elif isinstance(outputs, tuple) and hasattr(outputs, "_fields"):
        children = list(outputs._asdict().items())  # type: ignore[attr-defined]
    elif isinstance(outputs, (list, tuple)):
        children = [(str(index), value) for index, value in enumerate(outputs)]
    elif is_dataclass(outputs) and not isinstance(outputs, type):
        children = [(f.name, getattr(outputs, f.name)) for f in fields(outputs)]
    else:
        leaf = _as_tensor(outputs)
        if leaf is not None:
            yield path, leaf
        return
    for key, value in children:
        yield from leaves(value, f"{path}.{key}" if path else key)


def _as_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach()
    if value is None or isinstance(value, (str, bytes)):
        return None
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None  # not a number: nothing to measure


def _compare_tensors(path: str, a: Tensor, b: Tensor) -> Fidelity:
    name = f"output {path}" if path else "the output"
    if a.shape != b.shape:
        return _broken(f"{name}: shape {tuple(a.shape)} became {tuple(b.shape)}", path)
    notes = () if a.dtype == b.dtype else (f"{name}: {_name(a.dtype)} became {_name(b.dtype)}",)
    total = Fidelity(notes=notes)
    flat_a, flat_b = _flat(a), _flat(b)
    for start in range(0, flat_a.numel(), _CHUNK):
        piece = slice(start, start + _CHUNK)
        total = _add(total, _compare_chunk(path, flat_a[piece].double(), flat_b[piece]))
    return total


def _compare_chunk(path: str, a: Tensor, b: Tensor) -> Fidelity:
    b = b.to(device=a.device, dtype=torch.float64)
    elements, broken, skipped = a.numel(), 0, 0
    notes: tuple[str, ...] = ()
    # One sum tells whether anything is not finite; only then is the slow way worth its masks.
    if not math.isfinite(float((a.abs() + b.abs()).sum())):
        agree = (a == b) | (a.isnan() & b.isnan())
        finite = a.isfinite() & b.isfinite()
        broken = int((~(agree | finite)).sum())
        elements = int(finite.sum())
        skipped = finite.numel() - elements - broken
        a, b = a[finite], b[finite]
        if broken:
            name = f"output {path}" if path else "the output"
            notes = (f"{name}: NaN or infinity on one side only",)
    error = a - b
    largest = float(error.abs().max()) if error.numel() else 0.0
    return Fidelity(
        max_abs=math.inf if broken else largest,
        reference_energy=float(a.square().sum()),
        candidate_energy=float(b.square().sum()),
        error_energy=float(error.square().sum()),
        dot=float((a * b).sum()),
        elements=elements,
        skipped=skipped,
        broken=broken,
        worst=path,
        notes=notes,
    )


def _add(a: Fidelity, b: Fidelity) -> Fidelity:
    return Fidelity(
        max_abs=max(a.max_abs, b.max_abs),
        reference_energy=a.reference_energy + b.reference_energy,
        candidate_energy=a.candidate_energy + b.candidate_energy,
        error_energy=a.error_energy + b.error_energy,
        dot=a.dot + b.dot,
        elements=a.elements + b.elements,
        skipped=a.skipped + b.skipped,
        broken=a.broken + b.broken,
        worst=b.worst if b.max_abs > a.max_abs or not a.worst else a.worst,
        notes=tuple(dict.fromkeys((*a.notes, *b.notes))),
    )


def _with_notes(total: Fidelity) -> Fidelity:
    """`total` with what follows from the sums said in words."""
    notes = tuple(n for n in total.notes if n not in (_ZERO, _NOTHING, _BLANK))
    if total.blank:
        notes = (*notes, _BLANK if total.skipped else _NOTHING)
    elif total.reference_energy == 0.0 and not total.broken:
        notes = (*notes, _ZERO)
    return Fidelity(**{**total.__dict__, "notes": notes})


_ZERO = "the reference is all zeros: relative, cosine and SNR say only whether they are equal"
_NOTHING = "nothing was compared: there are no values in the outputs"
_BLANK = "nothing was compared: no value of the outputs is finite"


def _broken(note: str, path: str = "") -> Fidelity:
    return Fidelity(max_abs=math.inf, broken=1, worst=path, notes=(note,))


def _flat(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.reshape(-1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
