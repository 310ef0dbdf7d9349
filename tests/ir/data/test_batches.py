"""Every kind of data source, read twice, and every way in which data does not fit a model."""

import json
import pickle
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from graphwright.ir.data.batches import (
    example_sizes,
    load_data,
    synthetic_inputs,
)
from graphwright.ir.errors import ArgumentError
from graphwright.ir.signature import DimRange, Signature, TensorSpec

IMAGES = Signature((TensorSpec("x", "float32", ("batch", 3)),), (), {}, {"batch": DimRange()})
TOKENS = Signature(
    (
        TensorSpec("input_ids", "int64", ("batch", "seq"), (0, 50)),
        TensorSpec("attention_mask", "int64", ("batch", "seq"), (0, 2)),
    ),
    (),
    {},
    {"batch": DimRange(), "seq": DimRange(1, 12)},
)
ROWS = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)


def load(path, signature=IMAGES, seed=0, **section):
    return load_data({"data": Path(path).name, **section}, signature, seed, root=Path(path).parent)


def save(folder: Path, kind: str, arrays: dict[str, np.ndarray]) -> Path:
    if kind == "npz":
        np.savez(folder / "d.npz", **arrays)
        return folder / "d.npz"
    if kind == "compressed":
        np.savez_compressed(folder / "d.npz", **arrays)
        return folder / "d.npz"
    if kind == "safetensors":
        tensors = {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in arrays.items()}
        save_file(tensors, folder / "d.safetensors")
        return folder / "d.safetensors"
    (folder / "d").mkdir()
    for name, array in arrays.items():
        np.save(folder / "d" / f"{name}.npy", array)
    return folder / "d"


@pytest.mark.parametrize("kind", ["npz", "compressed", "safetensors", "folder"])
def test_array_files_give_the_same_batches_twice(tmp_path, kind):
    labels = np.arange(10)
    path = save(tmp_path, kind, {"x": ROWS, "labels": labels})
    batches = load(path, batch_size=4)
    for _ in range(2):
        assert torch.cat([b["x"] for b in batches]).numpy().tobytes() == ROWS.tobytes()
    assert [b["x"].shape[0] for b in batches] == [4, 4, 2]
    assert (len(batches), batches.samples, batches.has_labels) == (3, 10, True)
    assert all(list(b) == ["x"] for b in batches)
    assert torch.cat([y for _, y in batches.labelled()]).tolist() == labels.tolist()


@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(ROWS),
        ROWS.astype(">f4"),
        ROWS.astype(np.float64),  # the same values: nothing is lost
        np.arange(30, dtype=np.uint8).reshape(10, 3),
    ],
    ids=["fortran", "big-endian", "float64", "uint8"],
)
def test_layout_and_lossless_dtypes_do_not_matter(tmp_path, array):
    batches = load(save(tmp_path, "npz", {"x": array}))
    read = torch.cat([b["x"] for b in batches])
    assert read.dtype == torch.float32
    assert np.array_equal(read.numpy(), array.astype(np.float32))


def test_batches_are_copies_not_the_file(tmp_path):
    path = save(tmp_path, "npz", {"x": ROWS})
    batches = load(path)
    for batch in batches:
        batch["x"].zero_()
    assert torch.cat([b["x"] for b in batches]).numpy().tobytes() == ROWS.tobytes()


def test_samples_are_the_first_ones(tmp_path):
    batches = load(save(tmp_path, "npz", {"x": ROWS}), samples=5, batch_size=2)
    assert [b["x"].shape[0] for b in batches] == [2, 2, 1]
    assert np.array_equal(torch.cat([b["x"] for b in batches]).numpy(), ROWS[:5])


def test_other_columns_are_left_out_and_said(tmp_path):
    batches = load(save(tmp_path, "npz", {"x": ROWS, "ids": np.arange(10)}))
    assert batches.notes == ("d.npz: ['ids'] are not inputs of the model: left out",)


def test_fixed_batch_size_wins_and_the_rest_is_dropped(tmp_path):
    fixed = Signature((TensorSpec("x", "float32", (4, 3)),), (), {})
    batches = load(save(tmp_path, "npz", {"x": ROWS}), fixed, batch_size=3)
    assert [b["x"].shape[0] for b in batches] == [4, 4]


def test_a_rest_below_the_smallest_batch_is_dropped(tmp_path):
    pairs = Signature(IMAGES.inputs, (), {}, {"batch": DimRange(2)})
    batches = load(save(tmp_path, "npz", {"x": ROWS}), pairs, batch_size=3)
    assert [b["x"].shape[0] for b in batches] == [3, 3, 3]


def test_input_without_a_sample_axis_goes_to_every_batch(tmp_path):
    signature = Signature(
        (*IMAGES.inputs, TensorSpec("table", "float32", (2, 2)), TensorSpec("t", "float32", ())),
        (),
        {},
        {"batch": DimRange()},
    )
    table = np.eye(2, dtype=np.float32)
    path = save(tmp_path, "npz", {"x": ROWS, "table": table, "t": np.float32(3)})
    batches = list(load(path, signature, batch_size=5))
    assert len(batches) == 2
    assert all(np.array_equal(b["table"], table) and b["t"].item() == 3 for b in batches)


MODULE = """
    import torch
    calls = []
    def batches():
        calls.append(1)
        g = torch.Generator().manual_seed(0)
        for _ in range(3):
            yield {"x": torch.rand(4, 3, generator=g), "labels": torch.zeros(4)}
    tuples = [(torch.ones(2, 3), torch.tensor([0, 1])), (torch.ones(2, 3), torch.tensor([1, 1]))]
    bare = [torch.ones(2, 3)]
    once = iter(bare)
    number = 3
    def nothing(): return []
    def wrong(): return 3
"""


@pytest.fixture
def module(tmp_path, request):
    name = "data_" + "".join(c if c.isalnum() else "_" for c in request.node.name)
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE))
    return name


def test_function_is_called_again_for_every_reading(tmp_path, module):
    batches = load_data({"data": f"{module}:batches", "samples": 6}, IMAGES, 0, root=tmp_path)
    first, second = ([b["x"] for b in batches] for _ in range(2))
    assert len(first) == 2  # whole batches until there are six samples
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert batches.has_labels
    assert batches.samples == 8


def test_lists_of_tuples_and_of_tensors(tmp_path, module):
    batches = load_data({"data": f"{module}:tuples"}, IMAGES, 0, root=tmp_path)
    assert [y.tolist() for _, y in batches.labelled()] == [[0, 1], [1, 1]]
    assert len(load_data({"data": f"{module}:bare"}, IMAGES, 0, root=tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("once", "is an iterator, which can be read only once"),
        ("nothing", "gives 0 samples"),
        ("wrong", "gives a int, not batches"),
        ("absent", "has no 'absent'"),
    ],
)
def test_functions_that_give_no_data(tmp_path, module, name, message):
    with pytest.raises(ArgumentError, match=message):
        load_data({"data": f"{module}:{name}"}, IMAGES, 0, root=tmp_path)


def test_module_that_cannot_be_imported(tmp_path):
    (tmp_path / "broken_data.py").write_text("raise RuntimeError('no luck')")
    with pytest.raises(ArgumentError, match="cannot import broken_data: RuntimeError: no luck"):
        load_data({"data": "broken_data:x"}, IMAGES, 0, root=tmp_path)


def test_synthetic_is_seeded_and_within_ranges():
    section = {"data": "synthetic", "samples": 20, "batch_size": 8}
    a = list(load_data(section, TOKENS, 1, sizes={"seq": 10}))
    b = list(load_data(section, TOKENS, 1, sizes={"seq": 10}))
    c = list(load_data(section, TOKENS, 2, sizes={"seq": 10}))
    assert all(torch.equal(p[n], q[n]) for p, q in zip(a, b, strict=True) for n in p)
    assert any(p["input_ids"].shape != q["input_ids"].shape for p, q in zip(a, c, strict=True))
    assert [len(p["input_ids"]) for p in a] == [8, 8, 4]
    for batch in a:
        assert 2 <= batch["input_ids"].shape[1] <= 10
        assert 0 <= batch["input_ids"].min() <= batch["input_ids"].max() < 50
        mask = batch["attention_mask"]
        assert (mask.sum(1) >= 1).all()
        assert (mask.diff(dim=1) <= 0).all()  # ones, then zeros


def test_synthetic_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    list(load_data({"data": "synthetic"}, TOKENS, 0))
    assert torch.equal(before, torch.get_rng_state())


def test_synthetic_floats_keep_their_range():
    spec = TensorSpec("x", "float32", (1000,), (2.0, 3.0))
    drawn = synthetic_inputs(Signature((spec,), (), {}), {}, torch.Generator().manual_seed(0))["x"]
    assert drawn.min() >= 2.0
    assert drawn.max() < 3.0
    assert drawn.std() > 0.2


def test_example_sizes():
    examples = (torch.zeros(2, 7), torch.zeros(2, 7))
    assert example_sizes(TOKENS, examples) == {"batch": 2, "seq": 7}


@pytest.fixture
def texts(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnop"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "lines.txt"
    path.write_text("a b c\n\nd\n" + " ".join("abcdefghijklmnop") + "\n")
    return path


def test_text_is_tokenized_padded_and_cut(texts):
    batches = list(load(texts, TOKENS, batch_size=2))
    assert batches[0]["input_ids"].tolist() == [[1, 4, 5, 6, 2], [1, 7, 2, 0, 0]]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    long = batches[1]["input_ids"]
    assert long.shape == (1, 12)  # the model's longest sequence
    assert long[0, -1] == 2  # which still ends in [SEP]
    shorter = list(load(texts, TOKENS, batch_size=2, max_length=4))
    assert [b["input_ids"].shape[1] for b in shorter] == [4, 4]


def test_text_without_a_tokenizer(tmp_path):
    (tmp_path / "t.txt").write_text("hello\n")
    with pytest.raises(ArgumentError, match="text needs a tokenizer"):
        load(tmp_path / "t.txt", TOKENS)


def test_text_for_a_model_without_sequences(texts):
    images = Signature((TensorSpec("x", "float32", ("batch", 3, 8, 8)),), (), {})
    with pytest.raises(ArgumentError, match=r"inputs of shape \(batch, length\)"):
        load(texts, images)


@pytest.mark.parametrize(
    ("arrays", "section", "message"),
    [
        ({"X1": ROWS}, {}, r"d.npz: there is nothing for input 'x'"),
        ({"x": ROWS.reshape(-1)}, {}, r"input 'x': has rank 1 \(8,\); the model takes rank 2"),
        ({"x": ROWS[:, :2]}, {}, r"has shape \(8, 2\); the model takes rank 2 \(batch, 3\)"),
        ({"x": ROWS / 3.0 + np.float64(1e-12)}, {}, "is float64, and float32 cannot hold"),
        ({"x": ROWS}, {"samples": 11}, "holds 10 samples, 11 were asked for"),
        ({"x": ROWS[:0]}, {}, "holds no samples"),
        ({"x": ROWS, "labels": np.arange(9)}, {}, "different numbers of samples"),
        ({"x": np.where(ROWS[9, 0] == ROWS, np.nan, ROWS)}, {}, "batch 1: .*row 1 holds NaN"),
        ({"x": np.array(["a"] * 10)}, {}, "holds no arrays"),
    ],
)
def test_data_that_does_not_fit(tmp_path, arrays, section, message):
    with pytest.raises(ArgumentError, match=message):
        load(save(tmp_path, "npz", arrays), **section)


def test_near_misses_are_offered(tmp_path):
    path = save(tmp_path, "npz", {"input_id": np.ones((4, 2), np.int64)})
    with pytest.raises(
        ArgumentError, match="nothing for input 'input_ids'; did you mean 'input_id'"
    ):
        load(path, TOKENS)


def test_sizes_must_agree_between_inputs_and_stay_in_range(tmp_path):
    ids, mask = np.ones((4, 5), np.int64), np.ones((4, 6), np.int64)
    path = save(tmp_path, "npz", {"input_ids": ids, "attention_mask": mask})
    with pytest.raises(ArgumentError, match="dimension 'seq' is 6 here and 5 in another input"):
        load(path, TOKENS)
    long = np.ones((4, 13), np.int64)
    path = save(tmp_path, "npz", {"input_ids": long, "attention_mask": long})
    with pytest.raises(ArgumentError, match="dimension 'seq' is 13; the model takes 1 to 12"):
        load(path, TOKENS)


@pytest.mark.parametrize("wrap", [np.savez, np.savez_compressed])
def test_pickled_arrays_are_refused_unopened(tmp_path, wrap):
    target = tmp_path / "created"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (target,)

    wrap(tmp_path / "d.npz", x=np.array([Bomb()], dtype=object))
    with pytest.raises(ArgumentError, match="cannot be read"):
        load(tmp_path / "d.npz")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.npy").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ArgumentError, match="cannot be read"):
        load(tmp_path / "d")
    assert not target.exists()


@pytest.mark.parametrize("name", ["d.npz", "d.safetensors", "d.bin", "gone.npz"])
def test_unreadable_files(tmp_path, name):
    if name != "gone.npz":
        (tmp_path / name).write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ArgumentError, match=r"cannot be read|are not known|no such file"):
        load(tmp_path / name)


def test_truncated_archive(tmp_path):
    path = save(tmp_path, "npz", {"x": np.zeros((100, 3), np.float32)})
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ArgumentError, match="cannot be read"):
        load(path)
    header = json.dumps({"x": {"dtype": "F32", "shape": [10, 3], "data_offsets": [0, 120]}})
    short = tmp_path / "d.safetensors"
    short.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0" * 60)
    with pytest.raises(ArgumentError, match="cannot be read"):
        load(short)


def test_padding_that_every_row_has_is_cut_off(tmp_path):
    from graphwright.ir.signature import DimRange, Signature, TensorSpec

    specs = tuple(
        TensorSpec(name, "int64", ("batch", "seq")) for name in ("input_ids", "attention_mask")
    )
    signature = Signature(specs, (), None, {"batch": DimRange(), "seq": DimRange()})
    mask = np.zeros((4, 10), dtype=np.int64)
    for row, length in enumerate((3, 5, 4, 9)):
        mask[row, :length] = 1
    np.savez(tmp_path / "t.npz", input_ids=np.arange(40).reshape(4, 10), attention_mask=mask)
    section = {"data": "t.npz", "batch_size": 2}
    first, second = load_data(section, signature, 0, root=tmp_path)
    assert first["input_ids"].tolist() == [[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]]
    assert second["attention_mask"].shape == (2, 9)
    fixed = Signature((TensorSpec("attention_mask", "int64", ("batch", 10)),), (), None,
                      {"batch": DimRange()})  # fmt: skip
    np.savez(tmp_path / "m.npz", attention_mask=mask)
    whole = next(iter(load_data({"data": "m.npz"}, fixed, 0, root=tmp_path)))
    assert whole["attention_mask"].shape == (4, 10)
