"""TorchScript archives with code of our choice, and a generator of spellings of forbidden calls."""

from __future__ import annotations

import io
import random
import warnings
from collections.abc import Mapping
from functools import cache

import torch
from hostile.zips import rewritten
from torch import nn

HEAD = """class M(Module):
  __parameters__ = ["w", ]
  __buffers__ = []
  w : Tensor
  training : bool
  _is_full_backward_hook : Optional[bool]
  n : int
"""


class M(nn.Module):
    """The module whose archive gets other code."""

    __module__ = "__main__"  # which TorchScript calls `__torch__`

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.n = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.w


@cache
def script_archive() -> bytes:
    """An archive of TorchScript as torch writes it."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(M()), file)
    return file.getvalue()


def with_code(code: str | bytes, extra: Mapping[str, bytes] | None = None) -> bytes:
    """The archive with this code in its one source file."""
    text = code.encode() if isinstance(code, str) else code

    def change(name: str, content: bytes) -> bytes | None:
        if name.endswith(".debug_pkl"):
            return None
        return text if name.endswith(".py") else content

    return rewritten(script_archive(), change, extra)


def with_pickle(value: bytes, kind: str = "Any", member: str = "data.pkl") -> bytes:
    """The archive with the opcodes `value` where attribute `n` of type `kind` is pickled."""
    code = HEAD.replace("n : int", f"n : {kind}") + method("return x")

    def change(name: str, content: bytes) -> bytes | None:
        if name.endswith(".py"):
            return code.encode()
        if name.endswith(member):
            return content.replace(b"K\x03ub", value + b"ub")
        return None if name.endswith(".debug_pkl") else content

    return rewritten(script_archive(), change)


def method(body: str, arguments: str = "x: Tensor", name: str = "forward") -> str:
    """A method of class M; every line of `body` is indented."""
    lines = "".join(f"    {line}\n" for line in body.split("\n"))
    returned = "None" if name == "__setstate__" else "Tensor"
    return f"  def {name}(self: __torch__.M, {arguments}) -> {returned}:\n{lines}"


def calls(body: str) -> bytes:
    """An archive whose forward has this body."""
    return with_code(HEAD + method(body))


# --- forbidden calls ---------------------------------------------------------------------------

FORBIDDEN = {
    "save": '(x, "{flag}")',
    "from_file": '("{flag}", True, 2)',
    "manual_seed": "(3)",
    "seed": "()",
    "backward": "(torch.sum(x))",
    "set_data": "(x, x)",
    "record_stream": "(x, x)",
    "_test_warn_in_autograd": "(x)",
    "_nested_view_from_buffer": "(x, x, x, x)",
    "_resize_output_": "(x, [2], x)",
    "_cufft_set_plan_cache_max_size": "(0, 1)",
}
"""Operators of torch that touch more than their result, with arguments."""

FOREIGN = (
    "profiler::_record_function_enter", "cuda::set_device", "cuda::_set_device", "c10d::barrier_",
    "image::write_file", "torchaudio::sox_io_save_audio_file", "quantized::save",
    "prim::rpc_async", "prim::PythonOp", "prim::AddStatValue", "prim::TimePoint",
    "symm_mem::one_shot_all_reduce", "mylib::anything", "inductor::_alloc_from_pool",
)  # fmt: skip
"""Operators of namespaces that are not torch's own, and of the interpreter."""

_GAPS = ("", "", " ", "  ", "\t", "\x0b", "\x0c ", "\r")
_BROKEN = ("\n", "\n      ", " # a remark\n   ", "#\n\n", '\n\t# it\'s "quoted"\n ')


class Speller:
    """Writes one forbidden call in many ways; every way is one that torch takes for it."""

    def __init__(self, seed: int, flag: str) -> None:
        self.random = random.Random(seed)
        self.flag = flag

    def spelling(self) -> tuple[str, str]:
        """The name of an operator, and the body of a forward that calls it."""
        if self.random.random() < 0.15:
            return self._foreign()
        name = self.random.choice(list(FORBIDDEN))
        arguments = FORBIDDEN[name].format(flag=self.flag)
        forms = [self._plain, self._alias, self._getattr, self._nested, self._glued, self._branch]
        return name, self.random.choice(forms)(name, arguments)

    def gap(self, inside: bool = False) -> str:
        """White space; between brackets also comments and line breaks."""
        return self.random.choice(_GAPS + (_BROKEN if inside else ()))

    def chain(self, *names: str, inside: bool = False) -> str:
        """Names with dots between them, and white space around the dots."""
        text = names[0]
        for name in names[1:]:
            text += f"{self.gap(inside)}.{self.gap(inside)}{name}"
        return text

    def path(self, name: str, inside: bool = False) -> str:
        """The operator by one of the ways to it."""
        ways = [("torch", name), ("ops", "aten", name), ("torch", "autograd", name)]
        return self.chain(*self.random.choice(ways), inside=inside)

    def _plain(self, name: str, arguments: str) -> str:
        return f"{self.path(name)}{self.gap()}{arguments}\nreturn x"

    def _alias(self, name: str, arguments: str) -> str:
        local = self.random.choice(["t", "_0", "load0", "saver"])
        if self.random.random() < 0.5:
            first = f"{local} = {self.random.choice(['torch', 'torch.autograd'])}"
            return f"{first}\n{self.chain(local, name)}{self.gap()}{arguments}\nreturn x"
        return f"{local} = {self.path(name)}\n{local}{self.gap()}{arguments}\nreturn x"

    def _getattr(self, name: str, arguments: str) -> str:
        cut = self.random.randrange(len(name) + 1)
        quote = self.random.choice("'\"")
        text = f"{quote}{name[:cut]}{quote} {quote}{name[cut:]}{quote}" if cut else f'"{name}"'
        return f"getattr{self.gap()}(torch,{self.gap(True)}{text}){arguments}\nreturn x"

    def _nested(self, name: str, arguments: str) -> str:
        call = f"{self.path(name, inside=True)}{self.gap(True)}{arguments}"
        opened = self.random.randrange(1, 4)
        return f"a = {'(' * opened}{self.gap(True)}{call}{')' * opened}\nreturn x"

    def _glued(self, name: str, arguments: str) -> str:
        """Torch reads `is not` and `not in` as one token, whatever letter follows."""
        start = self.random.choice(["x is not", "1 not in"] if name == "save" else ["x is not"])
        return f"a = {start}{self.path(name)}{arguments}\nreturn x"

    def _branch(self, name: str, arguments: str) -> str:
        call = f"{self.path(name)}{self.gap()}{arguments}"
        head = self.random.choice(["if True:", "while True:", "for i in range(1):", "if (\nTrue):"])
        return f"{head}\n  {call}\n  return x\nreturn x"

    def _foreign(self) -> tuple[str, str]:
        full = self.random.choice(FOREIGN)
        namespace, _, name = full.partition("::")
        call = f"{self.chain('ops', namespace, name)}{self.gap()}(x)"
        return full, f"{call}\nreturn x"
