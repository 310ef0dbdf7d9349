"""The valid name that a misspelt one was most likely meant to be."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

_ALSO_CALLED = {
    "half": "float16", "fp16": "float16", "f16": "float16", "bf16": "bfloat16",
    "float": "float32", "fp32": "float32", "f32": "float32", "single": "float32",
    "double": "float64", "fp64": "float64", "f64": "float64", "long": "int64", "int": "int64",
    "short": "int16", "byte": "uint8", "char": "int8", "ort": "onnxruntime", "onnx": "onnxruntime",
    "top1": "accuracy", "acc": "accuracy", "ppl": "perplexity", "snr": "snr_db", "cos": "cosine",
    "quantization": "quantize", "pruning": "prune", "exports": "export", "backend": "lower",
    "backends": "lower", "data": "calibration", "train": "training", "constraints": "require",
    "requirements": "require", "eval": "evaluate", "steps": "passes", "pipeline": "passes",
    "maxhours": "max_minutes", "maxseconds": "max_minutes", "maxtime": "max_minutes",
    "maxloss": "max_drop", "maxmemory": "max_rss_gb", "maxsize": "max_file_mb",
    "groupsize": "block", "blocksize": "block", "qgroupsize": "block", "sym": "symmetric",
    "wbits": "bits", "weightbits": "bits", "nbits": "bits", "numbits": "bits", "bitwidth": "bits",
    "wbit": "bits", "abits": "activation_bits", "inputbits": "activation_bits",
    "descact": "act_order", "actorder": "act_order", "percdamp": "damping",
    "damppercent": "damping", "dampeningfrac": "damping", "dampening": "damping",
    "doublequant": "double_quantization", "usedoublequant": "double_quantization",
    "quanttype": "kind", "codetype": "kind", "observer": "activation_range",
    "smoothingstrength": "alpha", "migrationstrength": "alpha", "vectorlen": "vector_length",
    "vectorlens": "vector_length", "numcentroids": "centroids", "numrescentroids":
    "residual_centroids", "groupnum": "groups", "npercent": "outlier_percent", "kiter":
    "kmeans_iterations", "ktol": "kmeans_tolerance", "perchannel": "scales", "r": "rank",
    "ranks": "rank", "loraalpha": "alpha", "loradropout": "dropout", "rankpattern": "ranks",
    "alphapattern": "alphas", "modulestosave": "also_train", "feedforwardmodules": "feedforward",
    "userslora": "scaling", "adaptername": "name", "targetmodules": "targets",
    "modules": "targets", "layers": "targets", "include": "targets",
    "pruningratio": "sparsity", "amount": "sparsity", "prunen": "pattern",
    "nsamples": "samples", "numsamples": "samples", "numcalibrationsamples": "samples",
    "seqlen": "window", "seqlength": "window", "maxseqlength": "max_length", "maxseqlen":
    "max_length", "learningrate": "lr", "numepochs": "epochs", "numtrainepochs": "epochs",
    "maxsteps": "steps", "perdevicetrainbatchsize": "batch_size", "bs": "batch_size",
    "gradientaccumulationsteps": "accumulate", "maxgradnorm": "clip_norm",
}  # fmt: skip
"""Other tools' words for the same thing. Used only where the right-hand name is valid."""


def nearest(written: str, valid: Iterable[str], *, unlikely: Iterable[str] = ()) -> str:
    """The most likely meant of `valid`, or "" when none is near.

    Args:
        written: what stands in the file.
        valid: names that could stand there, in order of preference at equal distance.
        unlikely: names already used beside it, taken only when nothing else is as near.
    """
    names = list(dict.fromkeys(valid))
    if written in names:
        return written
    short = written[:80]
    also = _ALSO_CALLED.get(_letters(short))
    if also in names:
        return str(also)
    used = set(unlikely)
    near = [
        (apart + (0.6 if name in used else 0.0), index, name)
        for index, name in enumerate(names)
        if (apart := distance(short, name)) <= _allowed(short, name)
    ]
    if near:
        return min(near)[2]
    return _by_words(short, [name for name in names if name not in used])


def distance(written: str, name: str) -> float:
    """The distance of `written` from `name` as a misspelling; 0 for equal texts.

    Edits of letters (insert, drop, replace, swap neighbours: Damerau 1964) count one each, a
    doubled or halved letter a little less; case, dashes and underscores count next to nothing.
    The family of a pass may be missing or be another one.
    """
    plain = _edits(written, name)
    if "." not in name:
        return plain
    family, _, method = name.partition(".")
    given_family, dot, given_method = written.partition(".")
    if not dot:
        return min(plain, 0.5 + _edits(written, method))
    loose = 1.5 if _edits(given_family, family) > 2 else 0.75
    return min(plain, loose + _edits(given_method, method))


def _allowed(written: str, name: str) -> float:
    """Short names must be nearer: at most about a third of the letters may be wrong."""
    return max(1.1, min(len(written), len(name)) / 3)


def _edits(written: str, name: str) -> float:
    if written == name:
        return 0.0
    a, b = _letters(written), _letters(name)
    if a == b:
        return 0.1 if written.lower() == name.lower() else 0.2
    if a.rstrip("s") == b.rstrip("s"):
        return 0.7
    apart = sum(((Counter(a) - Counter(b)) | (Counter(b) - Counter(a))).values())
    if apart > 2 * max(1.1, len(b) / 3):  # far too many letters differ: no need to align them
        return float(apart)
    two_back: list[float] = []
    previous = [float(j) for j in range(len(b) + 1)]
    for i in range(1, len(a) + 1):
        current = [float(i)]
        for j in range(1, len(b) + 1):
            drop = 0.9 if i > 1 and a[i - 1] == a[i - 2] else 1.0
            add = 0.9 if j > 1 and b[j - 1] == b[j - 2] else 1.0
            same = a[i - 1] == b[j - 1]
            cost = min(previous[j] + drop, current[-1] + add, previous[j - 1] + (not same))
            if i > 1 and j > 1 and a[i - 2 : i] == b[j - 1] + b[j - 2]:
                cost = min(cost, two_back[j - 2] + 0.95)
            current.append(cost)
        two_back, previous = previous, current
    return previous[-1] + (0.0 if a[:1] == b[:1] else 0.05)


def _by_words(written: str, names: list[str]) -> str:
    """A name that starts with what is written, or holds all its words; "" when not just one."""
    text = _letters(written)
    if len(text) < 3:
        return ""
    wanted = _words(written)
    matches: tuple[Callable[[str], bool], ...] = (
        lambda n: _letters(n.rpartition(".")[2]).startswith(text) or _letters(n).startswith(text),
        lambda n: bool(wanted) and wanted <= _words(n),
        lambda n: len(_words(n)) > 1 and _words(n) <= wanted,
    )
    for match in matches:
        found = [name for name in names if match(name)]
        if len(found) == 1:
            return found[0]
    return ""


def _letters(text: str) -> str:
    return re.sub(r"[-_\s]", "", text).lower()


def _words(text: str) -> set[str]:
    parts = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", text)
    return {word.lower() for word in re.split(r"[^A-Za-z0-9]+", parts) if len(word) > 2}
