"""TorchScript: what is refused before torch reads it, in whatever spelling, and what is not."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from hostile import scripts
from hostile.scripts import HEAD, calls, method, with_code
from torch import nn

from graphwright.ir.errors import ModelError
from graphwright.ir.files.script_scan import findings
from graphwright.ir.files.torchscript import read_torchscript
from graphwright.ir.files.zips import Archive

SPELLINGS = 1000


def found(content: bytes) -> list[str]:
    return findings(Archive(Path("m.pt"), content))


def test_a_thousand_spellings_of_forbidden_calls_are_refused_by_name() -> None:
    """Each is named with its member; torch's own reader never sees one."""
    speller = scripts.Speller(seed=10, flag="ran.txt")
    bodies = set()
    while len(bodies) < SPELLINGS:
        name, body = speller.spelling()
        if body in bodies:
            continue
        bodies.add(body)
        problems = found(calls(body))
        assert problems, body
        assert all(problem.startswith("code/__torch__.py:") for problem in problems), problems
        shown = [name in problem for problem in problems]
        assert any(shown) or "is not" in body or "not in" in body or "getattr" in body, problems


def test_the_spellings_are_real(tmp_path: Path) -> None:
    """Torch takes them for what they are: those that write a file do write it."""
    flag = tmp_path / "ran.txt"
    speller = scripts.Speller(seed=3, flag=str(flag))
    drawn = [speller.spelling() for _ in range(300)]
    bodies = [body for name, body in drawn if name == "save"]
    assert len(bodies) > 15
    for body in [*bodies, f'return torch.from_file("{flag}", True, 2)']:
        (tmp_path / "m.pt").write_bytes(calls(body))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.load(str(tmp_path / "m.pt"))(torch.ones(2))
        assert flag.exists(), body
        flag.unlink()


LINE = len(HEAD.splitlines()) + 2


@pytest.mark.parametrize(
    "code",
    [
        HEAD + method("return x", 'x: Tensor, y: Tensor=torch.from_file("ran.txt", True, 2)'),
        HEAD + method("return x", "x: Tensor, y: Tensor=torch.ones([1000000000000])"),
        HEAD + '  k : Final[int] = torch.numel(torch.ones([9]))\n' + method("return x"),
        HEAD + method("self.n = 4\nwhile True:\n  pass", "s: int", "__setstate__")
        + method("return x"),
        HEAD + method("self.n = torch.numel(torch.ones([9]))", "s: int", "__setstate__")
        + method("return x"),
        HEAD + method("self.n = 9 ** 9 ** 9 ** 9", "s: int", "__setstate__") + method("return x"),
        HEAD + method('a = "a" * 1000000000000', "s: int", "__setstate__") + method("return x"),
        "class E(Enum):\n  A = torch.numel(torch.ones([9]))\n" + HEAD + method("return x"),
        "torch.numel(torch.ones([9]))\n" + HEAD + method("return x"),
    ],
    ids=["file", "memory", "constant", "loop", "call", "power", "text", "enum", "statement"],
)  # fmt: skip
def test_code_that_runs_at_load_may_only_assign(code: str) -> None:
    assert any("load" in problem for problem in found(with_code(code)))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("a = __torch__.torch.classes.quantized.Conv2dPackedParamsBase(x)", "object of class"),
        ("a : __torch__ . torch . classes.c10d.ProcessGroup = x", "object of class"),
        ("a = __torch__.torch\nb = a.classes.c10d.ProcessGroup(x)", "does not define"),
        ("a = ops.aten", "ops by itself"),
        ("g = getattr\na = g(torch, 'sa' + 've')", "getattr that is not called"),
        ('a = getattr(torch, "\\163ave")(x, "f")', "getattr of"),
        ("a = fork(x)", "fork"),
        ('a = """x"""', "characters"),
        ("a = 1save(x)", "characters"),
        ("a = x \\\n  .save()", "characters"),
        ("a = x # type: save", "characters"),
        ("a = é", "characters"),
        ("a = (x", "never closed"),
        ("a = x)", "closes nothing"),
        ("return " + "(" * 300 + "x" + ")" * 300, "nested deeper"),
        ("return " + "- " * 300 + "x", "nested deeper"),
        ("return x" + " + x" * 300, "nested deeper"),
        ("\n".join(" " * i + "if True:" for i in range(300)) + "\n" + " " * 300 + "pass", "deeper"),
        ("if True:\n  pass\n" + "elif True:\n  pass\n" * 1001, "branches"),
        ("\n" * 1200 + "return x", "empty lines"),
    ],
)
def test_refused_code(body: str, says: str) -> None:
    assert says in "\n".join(found(calls(body)))


def test_names_of_refused_operators_stay_with_their_line() -> None:
    problems = found(calls('y = torch.relu(x)\nz = (torch.\n  save(x, "f"))\nreturn y'))
    assert problems == [f"code/__torch__.py:{LINE + 2}: operator aten::save"]


@pytest.mark.parametrize("kind", ["class", "def"])
def test_definitions_that_name_each_other_without_end(kind: str) -> None:
    """Torch defines one within the other, and runs out of stack at some thousand."""
    lines = {
        "class": "class C{i}(Module):\n  a : __torch__.C{j}\n",
        "def": "def C{i}(x: Tensor) -> Tensor:\n  return __torch__.C{j}(x, )\n",
    }[kind]
    chain = "".join(lines.format(i=i, j=i + 1) for i in range(400))
    last = "class C400(Module):\n  b : int\n" + HEAD + method("return x")
    assert any("levels deep" in problem for problem in found(with_code(chain + last)))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (scripts.with_pickle(b"c__torch__.torch.classes.rpc\nX\n)\x81"), "object of class"),
        (scripts.with_pickle(b"cos\nsystem\nX\x02\x00\x00\x00ls\x85R"), "os.system"),
        (scripts.with_pickle(b"]" * 2000 + b"a" * 1999), "nested"),
        (
            scripts.with_pickle(
                b"ctorch.jit._pickle\nrestore_type_tag\n]X\xb8\x0b\x00\x00"
                + b"[" * 1500 + b"]" * 1500 + b"\x86R"
            ),
            "type '[[",
        ),
        (scripts.with_pickle(b"h\xff"), "damaged"),
        (with_code(HEAD + method("return x"), {"archive/model.json": b"{}"}), "does not write"),
        (with_code(HEAD + method("return x"), {"archive/code/a.so": b"\x7fELF"}), "does not write"),
        (
            with_code(
                HEAD + method("return x"),
                {"archive/bytecode.pkl": b"\x80\x02X\x0a\x00\x00\x00aten::save."},
            ),
            "operator aten::save",
        ),
    ],
    ids=["bind", "global", "lists", "types", "memo", "legacy", "library", "bytecode"],
)  # fmt: skip
def test_refused_members(content: bytes, says: str) -> None:
    assert says in "\n".join(found(content)), found(content)


class Everyday(nn.Module):
    """What scripted models have: fused calls, state, checks, warnings, names that need getattr."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.rnn = nn.LSTM(16, 8, 2, bidirectional=True)
        self.convolutions = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
        self.named = nn.ModuleDict({"a-b": nn.Linear(2, 2)})
        self.words = {"save": 1, "é": 2}

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        with torch.no_grad():
            z = self.encoder(x)
        out, _ = self.rnn(z)
        for layer in self.named.values():
            out = out + layer(torch.ones(1, 2)).sum() * self.words["save"]
        assert out.shape[0] > 0, "bad é"
        out = out + self.convolutions(out[:1, None]).mean()
        out = nn.functional.interpolate(out[None], scale_factor=2.0)[0]
        return out if y is None else out + y


def test_what_models_do_is_admitted(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(Everyday().eval())
        x = torch.randn(2, 6, 16)
        expected = scripted(x)
        traced = torch.jit.trace(Everyday().eval(), x)
        scripted.save(str(path))
    assert findings(Archive(path)) == []
    with torch.no_grad():
        assert torch.allclose(read_torchscript(path, allow_pickle=False)(x), expected, atol=1e-6)
    traced.save(str(path))
    assert findings(Archive(path)) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2))._save_for_lite_interpreter(str(path))
    assert findings(Archive(path)) == []


def test_a_refused_file_can_be_trusted(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(calls("torch.manual_seed(3)\nreturn x"))
    with pytest.raises(ModelError, match="aten::manual_seed"):
        read_torchscript(path, allow_pickle=False)
    assert read_torchscript(path, allow_pickle=True)(torch.ones(2)).tolist() == [1, 1]
