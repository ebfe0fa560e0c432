"""What the loss becomes if something goes: really removed, refitted, measured on a few blocks.

A trial leaves the model as it was. Layers before the one that changes are not run again: what
enters each layer is kept from one pass, and the layers before it are passed over. What reads the
units that go is refitted to give what the whole reader gives, from the sums that `refit.statistics`
takes in one pass over other blocks than those that the loss is measured on: on the same ones, a
reader of 1536 neurons would learn 3000 tokens by heart.

Beside the loss stands the divergence from the whole model, the mean of KL(whole || narrowed) over
positions. On a few thousand tokens the rise of a loss is lost in noise where little goes, since the
tokens are a sample; the divergence is a mean over all tokens of the vocabulary at each position,
and never below zero.
"""

import contextlib
import copy
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .budget import Removal
from .decision import Decision, carry_out
from .depth import carried, layers_of, silence, stack_of
from .families import find_groups
from .losses import capped, chunked_loss, hidden_states
from .precision import copied
from .progress import Track, silent
from .refit import statistics
from .units import Group, Slice, remove, removed

MOST = 1 << 30  # bytes of statistics that are held at one time


class Measured(NamedTuple):
    """Of a model on a text, or between two: loss, and divergence from the whole, nats per token."""

    loss: float
    divergence: float = 0.0

    def __sub__(self, before: "Measured") -> "Measured":
        """By how much both have risen."""
        return Measured(self.loss - before.loss, self.divergence - before.divergence)


@dataclass(frozen=True)
class Text:
    """Batches of token ids, (batch, length) int64: to measure the loss on, and to refit on."""

    measured: Sequence[Tensor]
    fitted: Sequence[Tensor]
    damping: float = 0.01
    dtype: torch.dtype | None = None  # of the passes; the model's own unless given

    @property
    def targets(self) -> int:
        """Over how many tokens a loss is the mean."""
        return sum(b.numel() - len(b) for b in self.measured)


@dataclass
class Log:
    """What was measured before, kept on disk as JSON lines, one for each measurement.

    A line that was cut short by a kill is dropped. Without a path nothing is kept.
    """

    path: Path | None = None
    known: dict[tuple[str, str], Measured] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> "Log":
        """The log of a file, which need not be there."""
        log = cls(path)
        whole: list[str] = []
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                held = json.loads(line)
                found = Measured(float(held["loss"]), float(held["divergence"]))
                log.known[held["decision"], held["removal"]] = found
                whole.append(line)
        if len(whole) < len(lines):
            fresh = path.with_suffix(f".{os.getpid()}")
            fresh.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
            fresh.replace(path)
        return log

    def add(self, decision: str, removal: str, found: Measured) -> None:
        """Keep what was measured."""
        self.known[decision, removal] = found
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                held = {"decision": decision, "removal": removal, **found._asdict()}
                file.write(json.dumps(held) + "\n")


def key(removal: Removal | None) -> str:
    """What a removal is called in a log."""
    if removal is None:
        return "nothing"
    units = ",".join(str(u) for u in removal.units)
    if len(removal.units) > 8:
        units = f"{len(removal.units)} {hashlib.sha256(units.encode()).hexdigest()[:16]}"
    return f"{removal.kind} {removal.layer} {removal.group} {units}".strip()


class Trials:
    """Trials on the model that a decision leaves; it is made when the first loss is unknown."""

    def __init__(self, model: Any, decision: Decision, text: Text, log: Log) -> None:
        """`model` is the whole one, and is left as it is."""
        self.model, self.decision, self.text, self.log = model, decision, text, log
        self.layers = layers_of(model)
        self._narrow: Any = None
        self._now = Measured(0.0)  # of the narrowed model as it is
        self._hidden: list[Tensor] = []  # what the whole model's head is given, for each batch
        self._head: Any = None
        self._entering: list[list[Tensor]] = []  # of each layer, for each batch
        self._tails: list[tuple[Any, ...] | None] = []  # what a layer gives beside hidden states
        self._fits: dict[str, Any] = {}  # by the parameter that is refitted

    def loss(self) -> float:
        """The loss of the model as it is left, in nats per token."""
        return self._known(None).loss

    def divergence(self) -> float:
        """Its divergence from the whole model, in nats per token."""
        return self._known(None).divergence

    def rises(self, removals: Iterable[Removal], track: Track = silent) -> list[Measured]:
        """How much loss and divergence rise with each of the removals alone, in nats per token."""
        removals = list(removals)
        todo = [r for r in removals if (self.decision.name, key(r)) not in self.log.known]
        before = self._known(None)
        todo.sort(key=lambda r: r.layer)
        chunks = list(self._chunks(todo))
        for removal, first in track(chunks, "trying removals"):
            if first:
                self._fits = {}
                self._ready(first)
            self._known(removal)
        self._fits = {}
        return [self.log.known[self.decision.name, key(r)] - before for r in removals]

    def _known(self, removal: Removal | None) -> Measured:
        name = self.decision.name, key(removal)
        if name not in self.log.known:
            self.log.add(*name, self._measured(removal))
        return self.log.known[name]

    @torch.no_grad()
    def _measured(self, removal: Removal | None) -> Measured:
        self._begin()
        if removal is None:
            return self._now
        model, number = self._narrow, int(self.decision.layers[: removal.layer].sum())
        if removal.kind == "layers":
            with self._from(number + 1, fed=number):
                return self._measure()
        layers = layers_of(model)
        stack = model.get_submodule(stack_of(model, layers[number].groups))
        whole = stack[number]
        stack[number] = copy.deepcopy(whole)
        try:
            if removal.kind in ("attention", "mlp"):
                half = "attention" if removal.kind == "attention" else "mlp"
                silence(model, layers[number].half(half))  # type: ignore[arg-type]
            else:
                self._take(removal)
            with self._from(number, fed=number):
                return self._measure()
        finally:
            stack[number] = whole

    def _take(self, removal: Removal) -> None:
        """Remove units from the layer, a copy, and refit what read them."""
        group = self._group(removal.group)
        before = self.decision.keep[removal.group]
        after = before.clone()
        after[list(removal.units)] = False
        keep = {group.name: after[before]}
        gone = removed([group], keep)
        fits = [self._fits[param].without(gone) for param in {s.param for s in group.reads}]
        remove(self._narrow, [group], keep)
        for fit in fits:
            fit.write(self._narrow, self.text.damping)

    def _group(self, name: str) -> Group:
        """The group as it is in the narrowed model."""
        stack = stack_of(self.model, [g for layer in self.layers for g in layer.groups])
        keep = {name: self.decision.keep[name]}
        (now,) = carried(keep, self.decision.layers, stack)
        return next(g for g in find_groups(self._narrow) if g.name == now)

    def _begin(self) -> None:
        """Make the narrowed model, and keep what enters each of its layers."""
        if self._narrow is not None:
            return
        narrow = self.model
        self._ahead()
        if self.decision.name != Decision.whole(self.layers).name:
            narrow = copied(self.model, None).eval().requires_grad_(False)
            carry_out(
                narrow, self.decision, self.text.fitted, damping=self.text.damping,
                dtype=self.text.dtype, out=False,
            )  # fmt: skip
        self._narrow = copied(narrow, self.text.dtype).eval().requires_grad_(False)
        stack = self._narrow.get_submodule(layers_of(self._narrow)[0].name.rpartition(".")[0])
        self._entering = [[] for _ in stack]
        self._tails = [None for _ in stack]
        with contextlib.ExitStack() as hooks, torch.no_grad():
            for number, layer in enumerate(stack):

                def look(_: Any, args: Any, kwargs: Any, out: Any, number: int = number) -> None:
                    self._entering[number].append(args[0] if args else kwargs["hidden_states"])
                    self._tails[number] = out[1:] if isinstance(out, tuple) else None

                hook = layer.register_forward_hook(look, with_kwargs=True)
                hooks.callback(hook.remove)
            self._now = self._measure()

    @torch.no_grad()
    def _ahead(self) -> None:
        """Keep what the head of the whole model is given, from which its logits are made again."""
        whole = copied(self.model, self.text.dtype).eval()
        device = next(whole.parameters()).device
        self._hidden = [hidden_states(whole, b.to(device)) for b in self.text.measured]
        self._head = whole.get_output_embeddings()

    def _measure(self) -> Measured:
        device = next(self._narrow.parameters()).device
        self._at = 0
        loss, divergence = 0.0, 0.0
        for batch, whole in zip(self.text.measured, self._hidden, strict=True):
            targets = batch[:, 1:].reshape(-1).to(device)
            apart = 0.0

            def piece(
                logits: Tensor, at: slice, targets: Tensor = targets, whole: Tensor = whole
            ) -> Tensor:
                nonlocal apart
                found = logits.float().log_softmax(-1)
                asked = capped(self.model, self._head(whole[at])).float().log_softmax(-1)
                apart += float(F.kl_div(found, asked, reduction="sum", log_target=True))
                return F.nll_loss(found, targets[at], reduction="sum")

            hidden = hidden_states(self._narrow, batch.to(device))
            loss += float(chunked_loss(self._narrow, hidden, piece))
            divergence += apart
            self._at += 1
        return Measured(loss / self.text.targets, divergence / self.text.targets)

    @contextlib.contextmanager
    def _from(self, number: int, *, fed: int) -> Iterator[None]:
        """Within, layers before `number` are passed over, and it is fed what enters layer `fed`."""
        stack = self._narrow.get_submodule(layers_of(self._narrow)[0].name.rpartition(".")[0])
        passed = list(stack)[:number]
        for at, layer in enumerate(passed):

            def over(*_: Any, tail: Any = self._tails[at], **__: Any) -> Any:
                hidden = self._entering[fed][self._at]
                return hidden if tail is None else (hidden, *tail)

            layer.forward = over
        try:
            yield
        finally:
            for layer in passed:
                del layer.forward

    def _ready(self, names: Sequence[str]) -> None:
        """Statistics of the readers of the groups, in one pass."""
        self._begin()
        now = {self._group(name).name for name in names}
        groups = [g for g in find_groups(self._narrow) if g.name in now]
        for fit in statistics(self._narrow, groups, self.text.fitted, dtype=self.text.dtype):
            self._fits[fit.slice.param] = fit

    def _chunks(self, todo: Sequence[Removal]) -> Iterator[tuple[Removal, list[str]]]:
        """Each removal, and with some of them the groups whose statistics to take before it."""
        groups = {g.name: g for layer in self.layers for g in layer.groups}
        names = list(dict.fromkeys(r.group for r in todo if r.group))
        opened: set[str] = set()
        for removal in todo:
            first: list[str] = []
            if removal.group and removal.group not in opened:
                held = 0
                for name in names[names.index(removal.group) :]:
                    held += sum(_held(self.model, s) for s in groups[name].reads)
                    if first and held > MOST:
                        break
                    first.append(name)
                opened.update(first)
            yield removal, first


def _held(model: Any, s: Slice) -> int:
    """Bytes of the statistics of a reader: plain, or the fused one of a layer's experts."""
    shape: tuple[int, ...] = tuple(model.get_parameter(s.param).shape)
    if len(shape) == 3:
        return 4 * math.prod(shape) + 4 * shape[0] * shape[2] ** 2
    return 4 * shape[s.dim] * (shape[s.dim] + shape[1 - s.dim])
