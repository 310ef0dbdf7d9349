"""Options of training, which every pass with `needs: training` embeds as `tune`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from graphwright.ir.options import Options

Function = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
        json_schema_extra={"x-graphwright": {"is": "module:function"}},
    ),
]
Count = Annotated[int, Field(ge=1)]


class TuneOptions(Options):
    """Options of training; the data is the spec's `training` section."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"epochs": 3, "lr": 1e-3}]})

    steps: Count | None = None
    """Optimizer steps at most; no bound when absent."""

    epochs: Count | None = None
    """Times that the data is gone through at most; 1 when neither this nor `steps` is given."""

    shuffle: bool = True
    """Whether every epoch draws the samples in a new order (where the data has samples to draw: a
    `module:function` gives its batches in its own order)."""

    optimizer: Literal["sgd", "adam", "adamw", "mfac"] = "adamw"
    """Rule of the update; `mfac` steps along the inverse Fisher of the last gradients (Frantar et
    al. 2021)."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate after the warm-up, before it decays."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decay of parameters with two or more dimensions (biases and norms have one): decoupled in
    `adamw`, added to the gradient in the others."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of `sgd`; of `mfac` the share of the last direction in an average of them."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """Decay rates of the two moments of `adam` and `adamw`."""

    fisher_gradients: Count = 1024
    """Gradients that `mfac` keeps; its memory is so many times that of the parameters in training,
    8 GiB at most, and is said in the report."""

    fisher_damp: Annotated[float, Field(gt=0)] = 1e-5
    """Number that `mfac` adds to the diagonal of the Fisher matrix."""

    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate from `lr` (after the warm-up) to 0 (at the end), or constant."""

    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps in which the learning rate rises linearly to `lr`."""

    loss: Literal["cross_entropy", "next_token", "mse", "kl", "teacher_mse"] | Function = (
        "cross_entropy"
    )
    """The loss: `cross_entropy` with class labels (-100 does not count), `next_token` of a
    language model, `mse` to float labels; with the model before the first pass as the teacher, `kl`
    of logits from its own, or `teacher_mse`, the relative squared difference of any output;
    `module:function` is a `function(outputs, batch)` of one's own, which is imported and run."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward pass; parameters and optimizer state stay as they are."""

    accumulate: Count = 1
    """Batches whose gradients are averaged for one step."""

    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of all gradients together; they are scaled down to it. Off when absent."""

    hold_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training samples that is kept out; their loss is the evaluation."""

    evaluate_every: Count | None = None
    """Steps between evaluations; once per epoch when absent."""

    patience: Count | None = None
    """Ends after so many evaluations without a better one; never when absent."""

    keep_zeros: Literal["auto"] | bool = "auto"
    """Whether weights that are exactly zero stay zero. `auto` keeps them where a pass before made
    them: where one weight of a layer is zero in 1% of its places or more, and not in all of them;
    then in all layers. Biases, norms and weights that are zero throughout train on; `true` keeps
    the zeros of weights that are zero throughout as well."""

    keep_best: bool = True
    """Whether the result is that of the best evaluation instead of the last step."""
