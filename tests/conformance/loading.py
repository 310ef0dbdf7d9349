"""What loads and what is refused, with which words: prints docs/loading.md, `--write` writes it.

    python tests/conformance/loading.py [--write]

Every row makes a small file or folder, loads it, and compares outputs with the model it was made
from.
"""

from __future__ import annotations

import json
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from graphwright.ir.errors import ModelError
from graphwright.ir.files import load_model

PAGE = Path(__file__).parents[2] / "docs" / "loading.md"
FILE = "model.safetensors"
NORM = "model.norm.weight"
Tensors = dict[str, torch.Tensor]

MARK = "## Folders of transformers"
"""The page is written by hand above this line, and from here on by this script."""


@dataclass
class Case:
    """One file or folder.

    Attributes:
        title: the row's first cell.
        make: writes it into a folder, and returns its path and the wanted outputs.
        inputs: of the model.
        section: the spec's `model` section.
        refusal: of dtypes, as a backend says it.
    """

    title: str
    make: Callable[[Path], tuple[Path, torch.Tensor]]
    inputs: torch.Tensor
    section: dict[str, Any] = field(default_factory=dict)
    refusal: Callable[[str], str] | None = None

    def row(self) -> str:
        """The table's row."""
        with tempfile.TemporaryDirectory() as folder:
            path, wanted = self.make(Path(folder))
            try:
                loaded = load_model(path, section=self.section, refusal=self.refusal)
            except ModelError as error:
                return _row(self.title, "refused", _words(error, folder))
            assert loaded.module is not None
            with torch.no_grad():
                output = loaded.module(self.inputs)
            output = getattr(output, "logits", output)
            same = output.dtype == wanted.dtype and torch.equal(output, wanted)
            return _row(self.title, "equal" if same else "DIFFERS", "; ".join(loaded.warnings))


def _words(error: ModelError, folder: str) -> str:
    parts = [error.message.rstrip("."), error.fix.rstrip("."), *error.details[:2]]
    return ". ".join(part for part in parts if part).replace(folder, "")


def _row(title: str, outcome: str, words: str) -> str:
    text = words.replace("|", "\\|")
    return f"| {title} | {outcome} | {text} |"


# ---- folders of transformers

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def _llama(dtype: torch.dtype = torch.float32, *, tied: bool = False) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


def _folder(
    edit: Callable[[Tensors], Tensors] | None = None,
    dtype: torch.dtype = torch.float32,
    wanted: torch.dtype | None = None,
    *,
    tied: bool = False,
    part: str = "",
    **how: Any,
) -> Callable[[Path], tuple[Path, torch.Tensor]]:
    """Makes a folder; its tensors edited, its outputs in another dtype, or a part of it alone."""

    def make(folder: Path) -> tuple[Path, torch.Tensor]:
        model = _llama(dtype, tied=tied)
        saved = getattr(model, part) if part else model
        saved.save_pretrained(folder, **how)
        if part:
            config = json.loads((folder / "config.json").read_text())
            config["architectures"] = [type(model).__name__]
            (folder / "config.json").write_text(json.dumps(config))
        if edit is not None:
            tensors = edit(safetensors.torch.load_file(folder / FILE))
            safetensors.torch.save_file(tensors, folder / FILE, {"format": "pt"})
        if wanted is not None:
            model = type(model).from_pretrained(folder, dtype=wanted)
        with torch.no_grad():
            return folder, model(IDS).logits

    return make


def _without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n not in names}


def _renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def _shard_gone(folder: Path) -> tuple[Path, torch.Tensor]:
    path, wanted = _folder(max_shard_size="2KB")(folder)
    sorted(folder.glob("*.safetensors"))[-1].unlink()
    return path, wanted


def _pickled(folder: Path) -> tuple[Path, torch.Tensor]:
    path, wanted = _folder()(folder)
    torch.save(safetensors.torch.load_file(folder / FILE), folder / "pytorch_model.bin")
    (folder / FILE).unlink()
    return path, wanted


def _no_bfloat16(dtype: str) -> str:
    from graphwright.backends.onnxruntime.lowering import Lowering

    return "" if dtype in Lowering.computes_in else f"onnxruntime does not run {dtype}"


def folders() -> list[Case]:
    """Folders of transformers."""
    half, brain = torch.float16, torch.bfloat16
    return [
        Case("float32", _folder(), IDS),
        Case("float16", _folder(dtype=half), IDS),
        Case("bfloat16, for triton", _folder(dtype=brain), IDS),
        Case("bfloat16, for onnxruntime", _folder(None, brain, torch.float32), IDS,
             refusal=_no_bfloat16),
        Case("float16, `dtype: float32`", _folder(None, half, torch.float32), IDS,
             {"dtype": "float32"}),
        Case("sharded", _folder(max_shard_size="2KB"), IDS),
        Case("`pytorch_model.bin`", _pickled, IDS),
        Case("tied embeddings", _folder(tied=True), IDS),
        Case("tied embeddings, both missing", _folder(_without("model.embed_tokens.weight"),
             tied=True), IDS),
        Case("a tensor missing", _folder(_without(NORM)), IDS),
        Case("a head that the folder does not have", _folder(part="model"), IDS),
        Case("a tensor too many", _folder(lambda t: {**t, "extra.weight": torch.ones(2)}), IDS),
        Case("a tensor misnamed", _folder(_renamed(lambda n: n.replace(NORM, "model.nrm.w"))), IDS),
        Case("a tensor of another shape", _folder(lambda t: {**t, NORM: torch.ones(7)}), IDS),
        Case("a shard missing", _shard_gone, IDS),
        Case("prefix `module.`", _folder(_renamed(lambda n: f"module.{n}")), IDS),
        Case("prefix `net.`", _folder(_renamed(lambda n: f"net.{n}")), IDS),
        Case("prefix `net.`, `strip_prefix: net.`", _folder(_renamed(lambda n: f"net.{n}")), IDS,
             {"strip_prefix": "net."}),
    ]  # fmt: skip


# ---- training checkpoints, with a factory

X = torch.arange(8.0).reshape(2, 4)


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()


def _saved(wrap: Callable[[Tensors], Any]) -> Callable[[Path], tuple[Path, torch.Tensor]]:
    def make(folder: Path) -> tuple[Path, torch.Tensor]:
        torch.save(wrap(_net().state_dict()), folder / "model.pt")
        with torch.no_grad():
            return folder / "model.pt", _net()(X)

    return make


def _other(state: Tensors) -> Tensors:
    return {name: tensor * 2 for name, tensor in state.items()}


def checkpoints() -> list[Case]:
    """Files of torch.save."""
    module = types.ModuleType("nets")
    module.build = _net  # type: ignore[attr-defined]
    sys.modules["nets"] = module
    rows: list[tuple[str, Callable[[Tensors], Any], dict[str, Any]]] = [
        ("a state dict", lambda s: s, {}),
        ("`state_dict` with a tensor beside it",
         lambda s: {"state_dict": s, "best_acc1": torch.tensor(71.3), "epoch": 3}, {}),
        ("`model_state` and an optimizer's", lambda s: {"step": 1, "model_state": s,
         "optimizer_state": {"state": {0: {"m": torch.ones(6)}}, "param_groups": []}}, {}),
        ("`model` and `model_ema`", lambda s: {"model": s, "model_ema": _other(s)}, {}),
        ("`model` and `model_ema`, `key: model_ema`",
         lambda s: {"model": _other(s), "model_ema": s}, {"key": "model_ema"}),
        ("`params_ema` alone", lambda s: {"params_ema": s}, {}),
        ("`generator` beside another net",
         lambda s: {"generator": s, "discriminator": {"0.weight": torch.ones(1, 4)}}, {}),
        ("`student` and `teacher`", lambda s: {"student": s, "teacher": _other(s)}, {}),
        ("Lightning's: `state_dict`, `model.`, a loss beside it", lambda s: {
         "state_dict": {**{f"model.{n}": t for n, t in s.items()}, "loss.weight": torch.ones(2)}},
         {}),
        ("prefix `module._orig_mod.`",
         lambda s: {f"module._orig_mod.{n}": t for n, t in s.items()}, {}),
        ("prefix `encoder.`", lambda s: {f"encoder.{n}": t for n, t in s.items()}, {}),
        ("a tensor missing", lambda s: {"model": _without("2.bias")(s)}, {}),
        ("a tensor too many", lambda s: {**s, "similarity_weight": torch.ones(1)}, {}),
        ("a tensor of another shape", lambda s: {**s, "2.bias": torch.ones(3)}, {}),
        ("a wrong `key`", lambda s: {"model": s}, {"key": "ema"}),
        ("an optimizer alone", lambda s: {"state": {0: {"m": torch.ones(2)}}, "param_groups": []},
         {}),
    ]  # fmt: skip
    return [
        Case(title, _saved(wrap), X, {"factory": "nets:build", **section})
        for title, wrap, section in rows
    ]


def page() -> Iterator[str]:
    """The lines of docs/loading.md."""
    yield from PAGE.read_text(encoding="utf-8").partition(MARK)[0].splitlines()
    checkpoint = "## Training checkpoints, with `model: {factory: nets:build}`"
    for title, cases, what in [(MARK, folders(), "folder"), (checkpoint, checkpoints(), "file")]:
        yield from (title, "", f"| {what} | outputs | words |", "| --- | --- | --- |")
        yield from (case.row() for case in cases)
        if title == MARK:
            yield ""


def main() -> None:
    """Prints the page, or writes it."""
    text = "\n".join(page()) + "\n"
    if "--write" in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
