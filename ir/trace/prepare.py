"""Puts a model into the state in which it can be traced, and back."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from graphwright.ir.graph.recurrent import whole_recurrent_layers
from graphwright.ir.trace.own_attention import own_attention
from graphwright.ir.trace.untouched import same_attributes


@contextlib.contextmanager
def traceable(model: nn.Module) -> Iterator[list[str]]:
    """Eval mode, no key-value cache, experts as batched products, no gradients, no chatter.

    Everything is put back on the way out, training flags module by module. Gives a list, in which
    stands afterwards what was done to the model's own ways and can be seen in its results.
    """
    said: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(same_attributes(model))
        stack.enter_context(_inference_mode(model))
        stack.enter_context(_no_needless_moves())
        stack.enter_context(_no_cache(model))
        stack.enter_context(_batched_experts(model))
        stack.enter_context(own_attention(model, said))
        stack.enter_context(_given_masks())
        stack.enter_context(_calls_that_raise())
        stack.enter_context(_no_nested_tensors(model, said))
        stack.enter_context(_no_packed_sequences())
        stack.enter_context(whole_recurrent_layers())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.no_grad())
        yield said


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Holds back what torch.export prints: whole graphs and advice about torch's internals."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _no_needless_moves() -> Iterator[None]:
    """`module.to(dtype)` in a forward method, where it changes nothing, is not traced.

    Exporting swaps parameters for stand-ins, and `to` refuses to move those.
    """
    move = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if not kwargs and len(args) == 1 and isinstance(args[0], torch.dtype):
            floating = [t for t in self.parameters() if t.is_floating_point()]
            if all(t.dtype == args[0] for t in [*floating, *self.buffers()]):
                return self
        return move(self, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.to = move  # type: ignore[method-assign]


@contextlib.contextmanager
def _inference_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """A key-value cache among the outputs is Python state, which no graph can hold."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    found = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    for config in found:
        config.use_cache = False
    try:
        yield
    finally:
        for config in found:
            config.use_cache = True


@contextlib.contextmanager
def _batched_experts(model: nn.Module) -> Iterator[None]:
    """Mixture-of-experts layers of transformers loop over the experts that were hit, or call an
    op no backend knows; `batched_mm` is the form that is plain matrix products."""
    restore: list[tuple[Any, Any]] = []
    for module in model.modules():
        settable = getattr(module, "_can_set_experts_implementation", None)
        if settable is None or not settable():
            continue
        config: Any = module.config
        before = getattr(config, "_experts_implementation", None)
        try:
            module.set_experts_implementation("batched_mm")  # type: ignore[operator]
        except (ValueError, RuntimeError):
            continue
        restore.append((module, before))
    try:
        yield
    finally:
        for module, before in reversed(restore):
            with contextlib.suppress(ValueError, RuntimeError):
                module.set_experts_implementation(before)


@contextlib.contextmanager
def _calls_that_raise() -> Iterator[None]:
    """A model may catch what a module raises and call it another way (`except TypeError`).

    torch.fx keeps the modules that are being called on a stack, and would leave that one on it.
    """
    call = fx.Tracer.call_module

    def call_module(self: Any, *arguments: Any) -> Any:
        depth = len(self.module_stack)
        try:
            return call(self, *arguments)
        except BaseException:
            while len(self.module_stack) > depth:
                self.module_stack.popitem(last=True)
            raise

    tracer: Any = fx.Tracer
    tracer.call_module = call_module
    try:
        yield
    finally:
        tracer.call_module = call


@contextlib.contextmanager
def _given_masks() -> Iterator[None]:
    """nn.Transformer compares a mask with the causal one, a branch on data, to pass a hint on.

    The hint only chooses a faster kernel; without it the mask itself is used.
    """
    module = nn.modules.transformer
    before = getattr(module, "_detect_is_causal_mask", None)
    if before is None:
        yield
        return

    def hint(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    module._detect_is_causal_mask = hint
    try:
        yield
    finally:
        module._detect_is_causal_mask = before


@contextlib.contextmanager
def _no_nested_tensors(model: nn.Module, said: list[str]) -> Iterator[None]:
    """nn.TransformerEncoder drops padded positions where a mask allows, which no graph can hold.

    Its layers compute the same at all other positions without.
    """
    names = {id(module): name for name, module in model.named_modules()}
    encoder = nn.TransformerEncoder
    before = encoder.forward

    @functools.wraps(before)
    def forward(
        self: nn.TransformerEncoder,
        src: Any,
        mask: Any = None,
        src_key_padding_mask: Any = None,
        is_causal: bool | None = None,
    ) -> Any:
        if src_key_padding_mask is not None and getattr(self, "use_nested_tensor", False):
            self.use_nested_tensor = False
            note = (
                f"nn.TransformerEncoder {names.get(id(self), '')!r} is traced without nested "
                "tensors: where its padding mask is set, eager gives zeros, and the program what "
                "the layers compute there"
            )
            if note not in said:
                said.append(note)
        return before(self, src, mask, src_key_padding_mask, is_causal)

    encoder.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        encoder.forward = before  # type: ignore[method-assign]


class PackedSequenceError(RuntimeError):
    """A model packs sequences while it is traced."""


@contextlib.contextmanager
def _no_packed_sequences() -> Iterator[None]:
    """The sizes of a packed sequence are values of a tensor: a trace stops where it is packed."""
    functions: Any = torch._VF
    before = functions._pack_padded_sequence

    def pack(*args: Any) -> Any:
        if torch.compiler.is_exporting():
            raise PackedSequenceError("pack_padded_sequence")
        return before(*args)

    functions._pack_padded_sequence = pack
    try:
        yield
    finally:
        functions._pack_padded_sequence = before
