"""Options of training, which every pass with `needs: training` embeds as `tune`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from graphwright.ir.options import Options, Rule, only_with

Function = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
        json_schema_extra={"x-graphwright": {"is": "module:function"}},
    ),
]
Count = Annotated[int, Field(ge=1)]


Positive = Annotated[float, Field(gt=0)]


class BatchSizeOptions(Options):
    """Options of batches that grow."""

    rules = (
        only_with("eta", "policy", ("norm_test", "coordinate")),
        only_with("theta", "policy", ("inner_product", "augmented")),
        only_with("nu", "policy", ("augmented",)),
    )

    policy: Literal["norm_test", "inner_product", "augmented", "coordinate"]
    """The noise that is held down: of the whole gradient (`norm_test`), of the gradient along
    itself (`inner_product`), of that and across it (`augmented`), or of every entry by itself
    (`coordinate`, for AdaGrad)."""

    eta: Positive = 0.1
    """For `norm_test` and `coordinate`: largest deviation, as a share of the gradient."""

    theta: Positive = 0.1
    """For `inner_product` and `augmented`: largest deviation along the gradient, as a share."""

    nu: Positive = 0.1
    """For `augmented`: largest deviation across the gradient, as a share."""

    max: Annotated[int, Field(ge=2)] = 4096
    """Samples of a step at most. Near a minimum every test asks for more without end."""


class MixOptions(Options):
    """Options of made samples among the real ones."""

    data: Annotated[str, Field(min_length=1, examples=["made.npz"])]
    """The made samples, with labels where the real ones have some: data as in the section
    `training`."""

    probability: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Probability of a batch to be all made; otherwise it is all real."""

    background: Annotated[int, Field(ge=0)] | None = None
    """Class index that does not count in made samples, as the background of made images, where
    there may be objects without a label; every label counts when absent."""


class TuneOptions(Options):
    """Options of training; the data is the spec's `training` section."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"epochs": 3, "lr": 1e-3}]})

    displaces: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "steps": ("epochs",), "epochs": ("steps",), "loss": ("label_smoothing",),
        "schedule": ("milestones", "step_share", "gamma"),
    }  # fmt: skip

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("milestones", "bool(milestones) == (schedule == 'multistep')",
             "milestones belong to schedule multistep, and it needs them"),
        Rule("milestones", "all(a < b for a, b in zip(milestones, milestones[1:]))",
             "milestones have to rise"),
        Rule("step_share", "(step_share is not None) == (schedule == 'step')",
             "step_share belongs to schedule step, and it needs it"),
        Rule("gamma", "'gamma' not in given or schedule in ('step', 'multistep')",
             "gamma has no part in schedule {schedule}"),
        Rule("min_lr", "min_lr <= lr", "min_lr {min_lr:g} is more than lr {lr:g}"),
        Rule("label_smoothing", "not label_smoothing or loss in ('cross_entropy', 'next_token')",
             "label_smoothing has no part in loss {loss}"),
        Rule("select", "select == 'loss' or hold_out",
             "select chooses among evaluations: set hold_out to a share of the samples"),
        Rule("batch_size", "batch_size is None or accumulate > 1",
             "batch_size tells noise by the batches of one step: set accumulate to 2 or more"),
        Rule("mix", "mix is None or mix.get('background') is None or ':' in loss"
             " or loss in ('cross_entropy', 'next_token')",
             "mix.background is a class index, which loss {loss} has none of"),
    )  # fmt: skip

    steps: Count | None = None
    """Optimizer steps at most; no bound when absent."""

    epochs: Count | None = None
    """Times that the data is gone through at most; 1 when neither this nor `steps` is given."""

    shuffle: bool = True
    """Whether every epoch draws the samples in a new order (where the data has samples to draw: a
    `module:function` gives its batches in its own order)."""

    optimizer: Literal["sgd", "adam", "adamw", "mfac", "adagrad", "adagrad_norm"] = "adamw"
    """Rule of the update; `mfac` steps along the inverse Fisher of the last gradients (Frantar et
    al. 2021); `adagrad` divides by the root of all squared gradients so far, `adagrad_norm` by one
    root for all parameters (Ward et al. 2019)."""

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

    schedule: Literal["constant", "linear", "cosine", "step", "multistep"] = "cosine"
    """Course of the learning rate behind the warm-up: from `lr` to `min_lr` at the end (`linear`,
    `cosine`); times `gamma` at every one of `milestones` (`multistep`), or whenever another
    `step_share` of the steps is done (`step`); or `constant`."""

    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """For `multistep`: shares of the steps behind the warm-up, rising."""

    step_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """For `step`: the share of the steps behind the warm-up after which the rate falls again."""

    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """For `step` and `multistep`: factor of the learning rate."""

    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate that no schedule goes below, once the warm-up is over."""

    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps in which the learning rate rises linearly to `lr`."""

    loss: Literal["cross_entropy", "next_token", "mse", "kl", "teacher_mse"] | Function = (
        "cross_entropy"
    )
    """The loss: `cross_entropy` with class labels (-100 does not count), `next_token` of a
    language model, `mse` to float labels; with the model before the first pass as the teacher, `kl`
    of logits from its own, or `teacher_mse`, the relative squared difference of any output;
    `module:function` is a `function(outputs, batch)` of one's own, which is imported and run."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """For `cross_entropy` and `next_token`: share of every label that is spread over all classes
    (Szegedy et al. 2016). Evaluations are without it."""

    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of all that is trained, which is what is evaluated and
    what results; in step t it is (1 + t) / (10 + t) where that is less. Off when absent."""

    mix: MixOptions | None = None
    """Batches of made samples among the real ones (Suri et al. 2023, "Gen2Det"). An epoch has as
    many batches as without them. None when absent."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward pass; parameters and optimizer state stay as they are."""

    accumulate: Count = 1
    """Batches whose gradients are averaged for one step; of the first step with `batch_size`."""

    batch_size: BatchSizeOptions | None = None
    """Growth of the steps' batches with the noise of their gradients, by whole batches of the data
    (Lau et al. 2024, "AdAdaGrad"). As many samples are read as without it, in fewer steps, and the
    learning rate goes by the samples. Off when absent."""

    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of all gradients together; they are scaled down to it. Off when absent."""

    hold_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training samples that is kept out; their loss is the evaluation."""

    select: Literal["loss", "accuracy"] | Function = "loss"
    """What the evaluation of the held-out samples measures, by which `keep_best` and `patience` go:
    their loss; `accuracy`, the share of labels that the largest logit names (-100 does not count);
    or a metric of one's own, `module:function` as in the section `evaluate`."""

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


class OwnLoss(TuneOptions):
    """Options of training for a recipe whose hooks make the whole loss."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"epochs": 3, "lr": 1e-3}]})

    rules = (
        Rule("hold_out", "not hold_out or select != 'loss'",
             "the loss of this recipe is of training alone: set select to a metric of held-out "
             "samples, or leave hold_out out"),
    )  # fmt: skip

    loss: Literal["own"] = "own"
    """The recipe's own loss, and nothing else."""
