"""Closed-form repair: what is left is refitted to do what the whole model did on the domain.

After units are gone, each matrix W that read them is replaced by the ridge solution

    W' = (T A' + d W_k) (A A' + d I)^-1,        d = damping * mean diag(A A')

where the columns of A are the activations of the kept units on the calibration tokens, those of T
the outputs wanted, ' is the transpose, and W_k are the kept columns of W, so that little data
moves W little. Least squares for what was removed is as old as Optimal Brain Surgeon (Hassibi and
Stork 1993); what matters here is which inputs and which outputs:

* `sequential` walks the layers in order. A comes from the network that is already cut up to here,
  and T is what brings the *residual stream* back to where the whole model has it after the layer:
  the output of the whole matrix, plus all that earlier cuts have shifted so far. Each layer then
  mends its forerunners instead of adding to their errors. Only one layer's statistics are held,
  so memory does not grow with depth.
* One-shot (`sequential=False`) takes A and T of every layer from the whole model, in one pass.

With text to forget (`Against`), what a reader is fed by it, F, is wanted to give nothing:

    W' = (T A' + d W_k) (A A' + d I + v F F')^-1,       v = weight * tokens of A / tokens of F

so that directions that the domain hardly uses and the other text uses much are let go of, and those
that the domain needs stay. F comes from the network as it is cut up to here; `sequential` only.

Several processes each see their share of the batches; A A', A T' and |T|^2 are added up over them
before anything is solved, so that all find the same weights. docs/log.md has what the choice of T
was worth in first experiments.
"""

import contextlib
import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import BadInput
from .experts import fed, fused
from .precision import copied
from .processes import share
from .progress import Track, silent
from .refit_experts import ExpertFit
from .refit_fit import Fit
from .scores import watched
from .units import Group, Keep, remove, removed

LAYER = re.compile(r"^(.*?\.\d+)\.")  # the layer that a module name lies in


@dataclass(frozen=True)
class RefitFacts:
    """What was refitted. `errors` is |T - W'A|^2 / |T|^2 per reading matrix, on the calibration."""

    tokens: int
    damping: float
    errors: dict[str, float]


@dataclass(frozen=True)
class Against:
    """Text to forget, (batch, length) token ids, and what a token of it counts in the refit."""

    batches: Sequence[Tensor]
    weight: float


@torch.no_grad()
def refit_and_remove(
    model: Any,
    groups: Sequence[Group],
    keep: Keep,
    batches: Sequence[Tensor],
    *,
    damping: float = 0.01,
    sequential: bool = True,
    dtype: torch.dtype | None = None,
    known: "Sequence[Fit | ExpertFit] | None" = None,
    against: Against | None = None,
    track: Track = silent,
) -> RefitFacts:
    """Remove the units that `keep` drops, in place, and refit what read them.

    `batches` are (batch, length) token ids, all of them in every process; forward passes run in
    `dtype` (the model's own unless given), statistics and solutions are float32. `known` are the
    `statistics` of the whole model, from which a one-shot refit takes no pass at all. `against` is
    text to forget, in a sequential refit. Raises BadInput for it elsewhere, and with experts.
    """
    tokens = sum(b.numel() for b in batches)
    cut = [g for g in groups if not keep[g.name].all()]
    if not cut:
        return RefitFacts(tokens, damping, {})
    dtype = dtype or next(model.parameters()).dtype
    if sequential and known is None and all(LAYER.match(g.name) for g in groups):
        errors = _layerwise(model, cut, keep, batches, damping, against, dtype, track)
    else:
        if against is not None:
            raise BadInput(
                "prune.forget_refit needs a sequential refit of a model whose units all lie in a "
                "list of layers. Give prune.refit sequential, or 0."
            )
        gone = removed(cut, keep)
        if known is None:
            known = statistics(model, cut, batches, gone=gone, dtype=dtype, track=track)
        read = {s.param for g in cut for s in g.reads}
        fits = [fit.without(gone) for fit in known if fit.slice.param in read]
        remove(model, cut, keep)
        errors = {fit.slice.param: fit.write(model, damping) for fit in fits}
    return RefitFacts(tokens, damping, errors)


@torch.no_grad()
def statistics(
    model: Any,
    groups: Sequence[Group],
    batches: Sequence[Tensor],
    *,
    gone: Mapping[tuple[str, int], Tensor] | None = None,
    dtype: torch.dtype | None = None,
    track: Track = silent,
) -> "list[Fit | ExpertFit]":
    """What the readers of `groups` are fed and give in the whole model, in one pass.

    Enough for the one-shot refit of any decision (`known` of `refit_and_remove`). It holds the
    square of each reader's width in float32 for all layers at once; positions in `gone` apart.
    """
    dtype = dtype or next(model.parameters()).dtype
    whole = copied(model, dtype)
    # Of experts all, since tokens are given to their places in the whole model.
    narrow = {axis: p for axis, p in (gone or {}).items() if axis[1] or not fused(model, axis[0])}
    fits = _fits(model, groups, narrow)
    with contextlib.ExitStack() as hooks:
        for fit in fits:

            def add(reader: Any, args: Any, out: Tensor, fit: Any = fit) -> None:
                fit.add(fed(args), _without_bias(reader, out))

            reader = whole.get_submodule(fit.slice.module)
            hooks.callback(reader.register_forward_hook(add).remove)
        for batch in track(share(batches), "refitting"):
            if hasattr(whole, "base_model"):
                _body(whole, batch)
            else:
                whole(batch)
    for fit in fits:
        fit.add_up()
    return fits


def _layerwise(
    model: Any,
    cut: Sequence[Group],
    keep: Keep,
    batches: Sequence[Tensor],
    damping: float,
    against: Against | None,
    dtype: torch.dtype,
    track: Track,
) -> dict[str, float]:
    """Layer by layer: inputs from the cut network, the whole network's residual stream wanted."""
    errors: dict[str, float] = {}
    names = _layer_names(model, cut)
    other: Sequence[Tensor] = against.batches if against else ()
    order, calls = _recorded(model, names, cut, [*batches, *other], dtype)
    tokens = sum(b.numel() for b in batches)
    pull = against.weight * tokens / sum(b.numel() for b in other) if against else 0.0
    batches, other = share(batches), share(other)
    astray = _entering(model, names[0], other, dtype)  # of the cut network, on text to forget
    shapes = [tuple(b.shape) for b in batches]
    gone = removed(cut, keep)
    ours = _entering(model, names[0], batches, dtype)  # hidden states of the cut network
    theirs = list(ours)  # and of the whole one
    for name in track(names, "refitting layers"):
        here = sorted(
            (g for g in cut if f"{g.name}.".startswith(f"{name}.")),
            key=lambda g: order.index(g.name),
        )
        layer = model.get_submodule(name)
        whole = copy.deepcopy(layer).to(dtype)
        fits: list[Any] = [*_fits(model, here, gone)]
        for fit in fits if against else ():
            fit.open_against()
        if here:
            remove(model, here, keep)
        ahead: list[Tensor] = []
        parts: list[tuple[Tensor, Tensor]] = []  # what the reader is fed, the layer's other output
        for fit in fits:
            ahead, parts = [], []
            small = copy.deepcopy(layer).to(dtype)
            at = fit.slice.module.removeprefix(f"{name}.")
            for h, w, shape in zip(ours, theirs, shapes, strict=True):
                _, y_whole, out_whole = _observed(whole, at, w, calls[name, shape])
                a, y_small, out_small = _observed(small, at, h, calls[name, shape])
                drift = _drift(fit.group, w - h, out_whole - out_small, y_whole - y_small)
                fit.add(a, y_whole + drift, kept_only=True)
                ahead.append(out_whole)
                if _adds_last(fit.group) and isinstance(fit, Fit):
                    parts.append((a.view(*h.shape[:-1], -1), out_small - y_small))
            for f, batch in zip(astray, other, strict=True):
                fit.add_against(_observed(small, at, f, calls[name, tuple(batch.shape)])[0])
            fit.add_up()
            errors[fit.slice.param] = fit.write(model, damping, pull)
        theirs = ahead or [
            _run(whole, w, calls[name, s]) for w, s in zip(theirs, shapes, strict=True)
        ]
        if parts:  # only the reader's own share has changed since the last pass
            weight = fits[-1].weight(model).to(dtype)
            ours = [rest + a @ weight for a, rest in parts]
        else:
            small = copy.deepcopy(layer).to(dtype)
            ours = [_run(small, h, calls[name, s]) for h, s in zip(ours, shapes, strict=True)]
        if other:
            small = copy.deepcopy(layer).to(dtype)
            astray = [_run(small, f, calls[name, tuple(b.shape)])
                      for f, b in zip(astray, other, strict=True)]  # fmt: skip
    return errors


def _drift(group: Group, entering: Tensor, leaving: Tensor, own: Tensor) -> Tensor | float:
    """How far the residual stream has drifted where the group's output is added to it.

    Differences, whole minus cut, of the layer's input, of its output and of the group's own
    contribution. Attention adds to what enters; the MLP adds last, so all that leaves but its own
    part counts. Where a norm stands between reader and stream, the drift cannot be mended here.
    """
    if not group.added:
        return 0.0
    return leaving - own if _adds_last(group) else entering


def _adds_last(group: Group) -> bool:
    """Whether nothing in the layer comes after what the group's readers add to the stream."""
    return group.added and group.kind != "heads"


def _fits(
    model: Any, groups: Sequence[Group], gone: Mapping[tuple[str, int], Tensor]
) -> "list[Fit | ExpertFit]":
    """Empty statistics for every reader; one for those of experts and of the neurons in them."""
    readers = {s.param: (g, s) for g in groups for s in g.reads}
    return [
        (ExpertFit if fused(model, param) else Fit).of(model, g, s, gone)
        for param, (g, s) in readers.items()
    ]


Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a layer is called with beside hidden states


class _StopHereError(Exception):
    """Ends a forward pass at the door of a layer."""


def _layer_names(model: Any, cut: Sequence[Group]) -> list[str]:
    """All layers, in order, from the first that loses a unit."""
    touched = {m.group(1) for g in cut if (m := LAYER.match(f"{g.name}."))}
    stack = next(iter(touched)).rpartition(".")[0]
    names = [f"{stack}.{i}" for i in range(len(model.get_submodule(stack)))]
    return names[min(names.index(t) for t in touched) :]


def _recorded(
    model: Any,
    names: Sequence[str],
    cut: Sequence[Group],
    batches: Sequence[Tensor],
    dtype: torch.dtype,
) -> tuple[list[str], dict[tuple[str, tuple[int, ...]], Call]]:
    """In which order groups are read, and how each layer is called for each shape of batch.

    Positions and masks depend on the layer (sliding windows) and the shape, not on the tokens.
    """
    order: list[str] = []
    calls: dict[tuple[str, tuple[int, ...]], Call] = {}
    for batch in {tuple(b.shape): b for b in batches}.values():
        with contextlib.ExitStack() as hooks:
            for name in names:

                def record(
                    _: Any,
                    args: Any,
                    kwargs: Any,
                    key: tuple[str, Any] = (name, tuple(batch.shape)),
                ) -> None:
                    rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
                    calls[key] = _cast(args[1:], dtype), _cast(rest, dtype)

                layer = model.get_submodule(name)
                hook = layer.register_forward_pre_hook(record, with_kwargs=True)
                hooks.callback(hook.remove)
            hooks.enter_context(watched(model, cut, lambda g, s, x: order.append(g.name)))
            _body(model, batch)
    return order, calls


def _entering(model: Any, name: str, batches: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The hidden states that enter a layer, (batch, length, hidden) each."""
    found: list[Tensor] = []

    def stop(_: Any, args: Any, kwargs: Any) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).to(dtype))
        raise _StopHereError

    hook = model.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in batches:
            with contextlib.suppress(_StopHereError):
                _body(model, batch)
    finally:
        hook.remove()
    return found


def _body(model: Any, batch: Tensor) -> None:
    model.base_model(input_ids=batch.to(next(model.parameters()).device), use_cache=False)


def _run(layer: Any, hidden: Tensor, call: Call) -> Tensor:
    out = layer(hidden, *call[0], **call[1])
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def _observed(layer: Any, at: str, hidden: Tensor, call: Call) -> tuple[Any, Tensor, Tensor]:
    """Run a layer: what its submodule `at` is fed and gives (bias apart), and the output."""
    seen: list[Any] = []

    def look(reader: Any, args: Any, out: Tensor) -> None:
        seen.extend((fed(args), _without_bias(reader, out).view(*hidden.shape[:-1], -1)))

    hook = layer.get_submodule(at).register_forward_hook(look)
    try:
        out = _run(layer, hidden, call)
    finally:
        hook.remove()
    return seen[0], seen[1], out


def _without_bias(reader: Any, out: Tensor) -> Tensor:
    bias: Tensor | None = getattr(reader, "bias", None)
    # A copy even so: some layers (Falcon's) go on adding to what the reader gave, in place.
    return out.clone() if bias is None else out - bias


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in `dtype`, in whatever tuples, lists and dicts they lie."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(v, dtype) for v in value)
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return value
