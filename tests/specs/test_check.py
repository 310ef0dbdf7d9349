"""The sentence a user reads for each kind of mistake."""

from __future__ import annotations

import pytest

HEAD = "version: 1\nlower: [onnxruntime]\n"
INPUTS = HEAD + "model:\n  inputs:\n"

PINNED = {
    "unknown section":
        ("version: 1\nlowr: [onnxruntime]\n",
         "spec.yaml:2:1: lowr: a spec has no section 'lowr'; did you mean 'lower'?"),
    "unknown section, nothing near":
        (HEAD + "colour: red\n",
         "spec.yaml:3:1: colour: a spec has no section 'colour'; there are version, model, "
         "calibration, training, evaluate, require, seed, passes, parts, lower, export, search, "
         "lock"),
    "key of another section":
        (HEAD + "samples: 3\n",
         "spec.yaml:3:1: samples: a spec has no section 'samples'; it belongs under 'calibration' "
         "or 'training' or 'evaluate'"),
    "no version":
        ("lower: [onnxruntime]\n", "spec.yaml:1:1: a spec needs 'version': write 'version: 1'"),
    "another version":
        ("version: 2\nlower: [onnxruntime]\n",
         "spec.yaml:1:10: version: expected 1, got 2; did you mean 1?"),
    "no mapping":
        ("- version: 1\n", "spec.yaml:1:1: a spec is a mapping; start with `version: 1`"),
    "section without content":
        (HEAD + "calibration:\n",
         "spec.yaml:3:13: calibration: expected a mapping, got nothing"),
    "unknown key":
        (HEAD + "require: {max_dorp: 0.1}\nevaluate: {data: synthetic}\n",
         "spec.yaml:3:11: require.max_dorp: 'require' has no key 'max_dorp'; did you mean "
         "'max_drop'?"),
    "unit in the key":
        (HEAD + "require: {max_file_gb: 1}\n",
         "spec.yaml:3:11: require.max_file_gb: 'require' has no key 'max_file_gb'; did you mean "
         "'max_file_mb'?"),
    "unit in the value":
        (HEAD + "require: {max_rss_gb: 512MB}\n",
         "spec.yaml:3:23: require.max_rss_gb: expected a number of GB, without a unit, got the "
         "text '512MB'; did you mean 0.512?"),
    "time in the value":
        (HEAD + "require: {max_minutes: 1.5 hours}\n",
         "spec.yaml:3:24: require.max_minutes: expected a number of minutes, without a unit, got "
         "the text '1.5 hours'; did you mean 90.0?"),
    "per cent":
        (HEAD + "require: {max_drop: 2%}\nevaluate: {data: synthetic}\n",
         "spec.yaml:3:21: require.max_drop: expected a number, got the text '2%'; did you mean "
         "0.02?"),
    "not finite":
        (HEAD + "require: {max_minutes: .inf}\n",
         "spec.yaml:3:24: require.max_minutes: expected a number, got the number inf"),
    "text for integer":
        (HEAD + 'seed: "4"\n',
         "spec.yaml:3:7: seed: expected an integer, got the text '4'; did you mean 4?"),
    "float for integer":
        (HEAD + "seed: 4.0\n",
         "spec.yaml:3:7: seed: expected an integer, got the number 4.0; did you mean 4?"),
    "bool for integer":
        (HEAD + "seed: true\n", "spec.yaml:3:7: seed: expected an integer, got true"),
    "out of range":
        (HEAD + "seed: -1\n",
         "spec.yaml:3:7: seed: expected 0 or more, got -1 (Seed of every random stream of "
         "the run)"),
    "number for text":
        (HEAD + "calibration: {data: 4}\n",
         "spec.yaml:3:21: calibration.data: expected a text, got the number 4; did you mean '4'?"),
    "missing key":
        (HEAD + "evaluate: {samples: 3}\n",
         "spec.yaml:3:1: evaluate: 'evaluate' needs 'data': `.npz` or `.safetensors` file or "
         "folder of `.npy` files with one array per input, `.txt` file with one text per line, "
         "`module:function` that gives batches (imported and run, "
         "unless `--no-code` is given), or `synthetic`. Paths start at the spec's folder."),
    "misspelt choice":
        (HEAD + "evaluate: {data: synthetic, metric: accuracy_}\n",
         "spec.yaml:3:37: evaluate.metric: expected one of cosine, accuracy, perplexity, snr_db, "
         "agreement, multiple_choice or module:function, got 'accuracy_'; did you mean "
         "'accuracy'?"),
    "no function":
        (HEAD + "evaluate: {data: synthetic, metric: 'my metric:f'}\n",
         "spec.yaml:3:37: evaluate.metric: 'my metric:f' is no module:function"),
    "name of another tool":
        (INPUTS + "    x: {dtype: half, shape: [4]}\n",
         "spec.yaml:5:16: model.inputs.x.dtype: expected one of float32, float16, bfloat16, "
         "float64, int64, int32, int16, int8, uint8, bool, got 'half'; did you mean 'float16'?"),
    "list without brackets":
        (INPUTS + "    x: {dtype: bool, shape: 4}\n",
         "spec.yaml:5:29: model.inputs.x.shape: expected a list, got the number 4; did you mean "
         "[4]?"),
    "no size":
        (INPUTS + "    x: {dtype: bool, shape: [0]}\n",
         "spec.yaml:5:30: model.inputs.x.shape[0]: expected 1 or more, got 0"),
    "rank of example":
        (INPUTS + "    x: {dtype: bool, shape: [batch, 3], example: [4]}\n",
         "spec.yaml:5:50: model.inputs.x.example: expected one size per dimension of shape "
         "[batch, 3], got [4]"),
    "size of example":
        (INPUTS + "    x: {dtype: bool, shape: [batch, 3], example: [4, 5]}\n",
         "spec.yaml:5:54: model.inputs.x.example[1]: size 5 does not fit shape [batch, 3]; did you "
         "mean 3?"),
    "example of one":
        (INPUTS + "    x: {dtype: bool, shape: [batch], example: [1]}\n",
         "spec.yaml:5:48: model.inputs.x.example[0]: dimension 'batch' must be traced with 2 or "
         "more, or its size is fixed; did you mean 2?"),
    "one dimension, two sizes":
        (INPUTS + "    x: {dtype: bool, shape: [n], example: [4]}\n"
         "    y: {dtype: bool, shape: [n], example: [5]}\n",
         "spec.yaml:6:44: model.inputs.y.example[0]: dimension 'n' is 5 here and 4 in input 'x'; "
         "did you mean 4?"),
    "range the wrong way":
        (INPUTS + "    x: {dtype: int64, shape: [4], range: [9, 0]}\n",
         "spec.yaml:5:42: model.inputs.x.range: expected [low, high) with low < high, got [9, 0]; "
         "did you mean [0, 9]?"),
    "range of three":
        (INPUTS + "    x: {dtype: int64, shape: [4], range: [0, 1, 2]}\n",
         "spec.yaml:5:42: model.inputs.x.range: expected at most 2 entries, got a list (Values lie "
         "in [low, high): token ids below the size of the vocabulary, for instance)"),
    "bound without metric":
        (HEAD + "require: {max_drop: 0.1}\n",
         "spec.yaml:3:11: require.max_drop: max_drop bounds the loss of a metric, and there is no "
         "'evaluate' section"),
    "arguments without factory":
        (HEAD + "model: {kwargs: {a: 1}}\n",
         "spec.yaml:3:9: model.kwargs: kwargs are for a factory, and there is none"),
    "nothing to do":
        ("version: 1\npasses: []\n",
         "spec.yaml:1:1: neither 'passes' nor 'lower' nor 'export' has an entry: there is nothing "
         "to do"),
    "unknown pass":
        ("version: 1\npasses:\n  - quantise.int8\n",
         "spec.yaml:3:5: passes[0]: no pass named 'quantise.int8'; did you mean 'quantize.int8'?"),
    "unknown pass with options":
        ("version: 1\npasses:\n  - quantize.in8: {activations: dynamic}\n",
         "spec.yaml:3:5: passes[0]: no pass named 'quantize.in8'; did you mean 'quantize.int8'?"),
    "no such pass":
        ("version: 1\npasses: [make.it.fast]\n",
         "spec.yaml:2:10: passes[0]: no pass named 'make.it.fast'; `graphwright passes` lists "
         "them"),
    "pass without family":
        ("version: 1\npasses: [FoldBatchNorm]\n",
         "spec.yaml:2:10: passes[0]: no pass named 'FoldBatchNorm'; did you mean "
         "'cleanup.fold_batch_norm'?"),
    "unknown backend":
        ("version: 1\nlower: [onnx]\n",
         "spec.yaml:2:9: lower[0]: no backend named 'onnx'; did you mean 'onnxruntime'?"),
    "backend twice":
        ("version: 1\nlower: [onnxruntime, onnxruntime]\n",
         "spec.yaml:2:22: lower[1]: onnxruntime is already there as lower[0]; remove one of the "
         "two"),
    "unknown option":
        ("version: 1\npasses:\n  - quantize.int8: {activation: dynamic}\n",
         "spec.yaml:3:21: passes[0].activation: quantize.int8 has no option 'activation'; did you "
         "mean 'activations'?"),
    "unknown option, nothing near":
        ("version: 1\npasses:\n  - cast.dtype: {colour: red}\n",
         "spec.yaml:3:18: passes[0].colour: cast.dtype has no option 'colour'; there are "
         "max_error, to, keep, keep_ops"),
    "option of a pass that has none":
        ("version: 1\npasses:\n  - cleanup.canonicalize: {x: 1}\n",
         "spec.yaml:3:28: passes[0].x: cleanup.canonicalize has no option 'x'; it takes none"),
    "word for bool":
        ("version: 1\npasses:\n  - quantize.int8: {embeddings: off}\n",
         "spec.yaml:3:33: passes[0].embeddings: expected true or false, got the text 'off'; did "
         "you mean false?"),
    "options beside the id":
        ("version: 1\npasses:\n  - quantize.int8:\n    embeddings: false\n",
         "spec.yaml:4:5: passes[0].embeddings: 'embeddings' stands beside 'quantize.int8'; options "
         "are indented below it"),
    "two passes in one entry":
        ("version: 1\npasses:\n  - cleanup.canonicalize:\n    cast.dtype:\n",
         "spec.yaml:4:5: passes[0]: 'cast.dtype' stands in the entry of 'cleanup.canonicalize'; "
         "each entry starts with its own dash"),
    "mapping for list":
        ("version: 1\npasses:\n  cast.dtype: {to: float16}\n",
         "spec.yaml:3:3: passes: expected a list, got a mapping; start each entry with "
         "'- cast.dtype'"),
    "text for list":
        ("version: 1\nlower: onnxruntime\n",
         "spec.yaml:2:8: lower: expected a list, got the text 'onnxruntime'; did you mean "
         "[onnxruntime]?"),
    "no calibration":
        ("version: 1\npasses:\n  - quantize.int8: {activations: static}\n",
         "spec.yaml:3:5: passes[0]: quantize.int8 needs data, and there is no 'calibration' "
         "section; add one, such as 'calibration: {data: samples.npz}'"),
    "misspelt kind":
        ("version: 1\npasses:\n  - quantize.int8: {targets: ['kind:liner']}\n",
         "spec.yaml:3:31: passes[0].targets[0]: no kind of layer named 'liner'; did you mean "
         "'kind:linear'?"),
    "only exclusions":
        ("version: 1\npasses:\n  - quantize.int8: {targets: ['!*.head']}\n",
         "spec.yaml:3:30: passes[0].targets: only exclusions; say first what is selected; did you "
         "mean ['*', '!*.head']?"),
    "no targets":
        ("version: 1\npasses:\n  - quantize.int8: {targets: []}\n",
         "spec.yaml:3:30: passes[0].targets: an empty list selects nothing; did you mean ['*']?"),
}  # fmt: skip


@pytest.mark.parametrize("name", PINNED)
def test_sentence(problems, name):
    text, sentence = PINNED[name]
    assert problems(text) == [sentence]


def test_all_problems_come_at_once_in_file_order(problems):
    found = problems(
        """\
        version: 1
        modle:
          inputs:
            ids: {dtyp: int64, shape: [batch, seq], example: [8]}
        calibratoin: {data: synthetic, smaples: 12.0}
        passes:
          - quantise.int8: {targets: ["kind:liner"]}
          - cleanup.canonicalise
        lower:
          - onnxruntme
        """
    )
    assert [line.split(":")[1:3] for line in found] == [
        ["2", "1"], ["4", "11"], ["4", "54"], ["5", "1"], ["5", "32"], ["5", "41"], ["7", "5"],
        ["7", "31"], ["8", "5"], ["8", "5"], ["10", "5"],
    ]  # fmt: skip


def test_a_misspelt_section_hides_nothing_below_it_and_causes_nothing_elsewhere(problems):
    (only,) = problems(
        "version: 1\nevalute: {data: synthetic}\nrequire: {max_drop: 0.1}\nlower: [triton]\n"
    )
    assert only.endswith("did you mean 'evaluate'?")


def test_an_unknown_section_that_may_be_any_causes_nothing_elsewhere(problems):
    (only,) = problems(
        "version: 1\nxyzzy: {data: synthetic}\nrequire: {max_drop: 0.1}\nlower: [triton]\n"
    )
    assert "xyzzy" in only


def test_thousands_of_problems_are_cut_off(problems):
    found = problems("version: 1\nlower: [triton]\n" + "".join(f"k{i}: 1\n" for i in range(3000)))
    assert len(found) == 201
    assert found[-1].endswith("only the first 200 problems are shown")


def test_text_from_the_file_cannot_break_the_line(problems):
    found = problems('version: 1\nlower: ["a\\nb\\e[31m"]\n"k\\n": 1\n')
    assert len(found) == 2
    assert all(line.isprintable() for line in found)
