"""Files of torch.save, in both formats, and bare pickles."""

from __future__ import annotations

import collections
import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from hostile.case import FLAG, Creates, Evaluates, Hostile, Restores, Shells, content
from hostile.zips import kept, rewritten
from torch import nn


def net() -> nn.Module:
    """The module that the factory of the tests builds."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


def saved(value: Any, **options: Any) -> bytes:
    """The bytes of torch.save."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def state() -> bytes:
    return saved(net().state_dict())


def with_pickle(opcodes: bytes) -> bytes:
    """A state dict's archive with another pickle in it."""
    return rewritten(state(), lambda n, c: opcodes if n.endswith("data.pkl") else c)


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def rebuilt(size: bytes, stride: bytes, numel: int = 4, offset: bytes = b"K\x00") -> bytes:
    """A state dict of one tensor with these opcodes for its size and its stride."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    count = b"\x8a\x08" + struct.pack("<q", numel)
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + count + b"tQ" + offset + size + stride
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip
    return with_pickle(b"\x80\x02}" + text("0.weight") + tensor + b"s.")


def long(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def legacy(place: int, hostile: bytes) -> bytes:
    """The old format with another pickle in one of its five places."""
    old = saved(net().state_dict(), _use_new_zipfile_serialization=False)
    stream, ends = io.BytesIO(old), [0]
    for _ in range(5):
        collections.deque(pickletools.genops(stream), maxlen=0)
        ends.append(stream.tell())
    return old[: ends[place]] + hostile + old[ends[place + 1] :]


def doubled() -> bytes:
    """A tuple of twice the same, sixty times over: hashing it as a key never ends."""
    return b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s."


def zip_with(info: Callable[[zipfile.ZipInfo], None], name: str = "archive/x") -> bytes:
    """A state dict's archive with one more member of odd attributes."""
    out = io.BytesIO(state())
    with zipfile.ZipFile(out, "a") as archive:
        member = zipfile.ZipInfo(name)
        info(member)
        archive.writestr(member, b"/etc/passwd")
    return out.getvalue()


def bomb(size: int = 1 << 27) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(size))
    return out.getvalue()


def encrypted() -> bytes:
    data = bytearray(state())
    place = data.rindex(b"PK\x01\x02")
    data[place + 8] |= 1
    return bytes(data)


def twice() -> bytes:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return zip_with(lambda i: None, "archive/data.pkl")


def link(info: zipfile.ZipInfo) -> None:
    info.external_attr = 0o120777 << 16


OLD = {"_use_new_zipfile_serialization": False}
OBJECTS = {"open": Creates, "shell": Shells, "eval": Evaluates, "state": Restores}


def _opcodes(name: str) -> bytes:
    """Ways to call `open(FLAG, "w")` that differ in their opcodes."""
    arguments = text(FLAG) + text("w")
    return {
        "global": b"\x80\x02cbuiltins\nopen\n" + arguments + b"\x86R.",
        "stack global": b"\x80\x04" + text("builtins") + text("open") + b"\x93" + arguments
        + b"\x86R.",
        "inst": b"(" + arguments + b"ibuiltins\nopen\n.",
        "object": b"(cbuiltins\nopen\n" + arguments + b"o.",
        "memo": b"\x80\x04" + text("builtins") + b"\x940" + text("open") + b"\x940h\x00h\x01\x93"
        + arguments + b"\x86R.",
        "decoys": b"\x80\x04" + text("builtins") + text("open") + b"(" + text("torch")
        + text("Size") + b"1\x93" + arguments + b"\x86R.",
        "new object": b"\x80\x02cbuiltins\nopen\n" + arguments + b"\x86\x81.",
        "extension": b"\x80\x02\x82\x01" + arguments + b"\x86R.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\ncbuiltins\nstr\n" + text("join") + b"\x86R.",
        "old os": b"\x80\x02cposix\nsystem\n" + text(f"touch {FLAG}") + b"\x85R.",
        "torch load": b"\x80\x02ctorch.serialization\nload\n" + text("m.pt") + b"\x85R.",
        "numpy": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R.",
        "argparse": b"\x80\x02cargparse\nNamespace\n)\x81.",
    }[name]  # fmt: skip


OPCODES = (
    "global", "stack global", "inst", "object", "memo", "decoys", "new object", "extension",
    "getattr", "old os", "torch load", "numpy", "argparse",
)  # fmt: skip

CASES: dict[str, Hostile] = {
    **{
        f"torch.save: object, {name}": Hostile(
            content(lambda cls=cls: saved({**net().state_dict(), "x": cls()})), "import", True
        )
        for name, cls in OBJECTS.items()
    },
    **{
        f"torch.save, old: object, {name}": Hostile(
            content(lambda cls=cls: saved({"x": cls()}, **OLD)), "--allow-pickle", True
        )
        for name, cls in OBJECTS.items()
    },
    **{
        f"torch.save: opcodes, {name}": Hostile(
            content(lambda name=name: with_pickle(_opcodes(name))), "", True
        )
        for name in OPCODES
    },
    **{
        f"torch.save, old: hostile pickle {place}": Hostile(
            content(lambda place=place: legacy(place, pickle.dumps(Creates(), 2))), "", True
        )
        for place in range(1, 5)
    },
    **{
        f"bare pickle, protocol {protocol}": Hostile(
            content(lambda protocol=protocol: pickle.dumps([Creates()], protocol)), "pickle", True
        )
        for protocol in range(6)
    },
    **{
        f"bare pickle: {name}": Hostile(content(lambda name=name: _opcodes(name)), "", True)
        for name in ("global", "inst", "stack global")
    },
    "torch.save: a second pickle": Hostile(
        content(lambda: rewritten(state(), kept, {"archive/b.pkl": _opcodes("global")})), "", True
    ),
    "torch.save: nested tuples": Hostile(
        content(lambda: with_pickle(b"\x80\x02})" + b"\x85" * 9999 + b"K\x01s.")), "nested", True),
    "torch.save: nested lists": Hostile(
        content(lambda: with_pickle(b"\x80\x02" + b"]" * 20_000 + b"a" * (20_000 - 1) + b".")),
        "nested", True),
    "torch.save: nested from inside": Hostile(
        content(lambda: with_pickle(
            b"\x80\x02(" + b"".join(b"]r" + struct.pack("<I", i) for i in range(5000))
            + b"1" + b"".join(b"j" + struct.pack("<I", i) + b"j" + struct.pack("<I", i + 1) + b"a0"
                              for i in range(4999)) + b"j\0\0\0\0.")), "nested", True),
    "torch.save: a doubled tuple as a key": Hostile(
        content(lambda: with_pickle(doubled())), "shared", True),
    "torch.save: cut pickle": Hostile(content(lambda: with_pickle(b"\x80\x02}X")), "cut", True),
    "torch.save: empty stack": Hostile(content(lambda: with_pickle(b"\x80\x02aa.")), "cut", True),
    "torch.save: no memo": Hostile(content(lambda: with_pickle(b"\x80\x02h\x05.")), "cut", True),
    "torch.save: huge bytearray": Hostile(
        content(lambda: with_pickle(
            b"\x80\x02cbuiltins\nbytearray\n" + long(1 << 50) + b"\x85R.")), "", True),
    "torch.save: repeats itself": Hostile(
        content(lambda: rebuilt(long(10**9) + long(10**9) + b"\x86", b"K\x00K\x00\x86")),
        "repeats", True),
    "torch.save: beyond its bytes": Hostile(
        content(lambda: rebuilt(long(10**9) + b"\x85", b"K\x01\x85")), "", True),
    "torch.save: negative stride": Hostile(
        content(lambda: rebuilt(b"K\x02\x85", long(-1) + b"\x85")), "", True),
    "torch.save: negative offset": Hostile(
        content(lambda: rebuilt(b"K\x02\x85", b"K\x01\x85", offset=long(-9))), "", True),
    "torch.save: storage beyond the file": Hostile(
        content(lambda: rebuilt(b"K\x02\x85", b"K\x01\x85", numel=10**14)), "", True),
    "torch.save: sizes that overflow": Hostile(
        content(lambda: rebuilt(long(1 << 40) * 2 + b"\x86", b"K\x01K\x01\x86")), "", True),
    "torch.save: absolute member": Hostile(
        content(lambda: rewritten(state(), kept, {"/etc/evil": b"x"})), "absolute", True),
    "torch.save: member outside": Hostile(
        content(lambda: rewritten(state(), kept, {"archive/../../evil": b"x"})), "outside", True),
    "torch.save: foreign path": Hostile(
        content(lambda: rewritten(state(), kept, {"archive/a\\..\\b": b"x"})), "foreign", True),
    "torch.save: linked member": Hostile(content(lambda: zip_with(link)), "link", True),
    "torch.save: a member twice": Hostile(content(twice), "twice", True),
    "torch.save: encrypted": Hostile(content(encrypted), "", True),
    "torch.save: bomb": Hostile(content(bomb), "bomb", True),
    "torch.save: cut": Hostile(content(lambda: state()[:-200]), "damaged", True),
    "torch.save: middle overwritten": Hostile(
        content(lambda: state()[:300] + bytes(300) + state()[600:]), "", True),
    "torch.save, old: nested": Hostile(
        content(lambda: legacy(3, b"\x80\x02" + b"]" * 3000 + b"a" * 2999 + b".")), "nested", True),
    "torch.save: sparse weights": Hostile(
        content(lambda: saved({**net().state_dict(), "0.bias": torch.zeros(6).to_sparse()})),
        "cannot be weights", True),
    "torch.save: weights without values": Hostile(
        content(lambda: saved({**net().state_dict(), "0.bias": torch.zeros(6, device="meta")})),
        "cannot be weights", True),
    "torch.save: an endless sparse tensor": Hostile(
        content(lambda: saved({**net().state_dict(), "0.bias": torch.sparse_coo_tensor(
            torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (10**9, 10**9),
            check_invariants=False)})),
        "cannot be weights", True),
    "torch.save, old: cut": Hostile(
        content(lambda: saved(net().state_dict(), **OLD)[:-30]), "", True),
    "torch.save: a module": Hostile(content(lambda: saved(net())), "--allow-pickle"),
    "torch.save: TorchScript's constants": Hostile(
        content(lambda: rewritten(state(), kept, {"archive/constants.pkl": b"N."})), "", True),
}  # fmt: skip
