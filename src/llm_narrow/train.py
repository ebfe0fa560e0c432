"""The one training loop. Recovery, group lasso, distillation and LoRA differ in what it is given.

Weights and the optimizer are float32; `bf16` runs forward and backward under autocast, which was
as fast here as a bfloat16 copy of the model (0.98 and 0.97 of 1.71 s in float32), needs no second
copy and keeps norms and the residual stream exact.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor

from . import processes
from . import state as states
from .blocks import Blocks
from .errors import BadInput
from .live import Tell, watching
from .losses import Loss, language_loss
from .processes import WithLoss
from .settings import TIMING, Settings
from .startup import (
    adamw,
    check_processes,
    check_weights,
    cut_rows,
    learned,
    not_finite,
    tracker_names,
    training,
)
from .state import Best, Snapshot


@dataclass(frozen=True)
class Step:
    """What the caller's own steps are told."""

    number: int  # from 1
    steps: int
    lr: float
    lr_left: float  # the sum of the learning rates of the steps after this one
    loss: float  # of this step, nats per token
    validation: float | None  # if one was measured since the step before
    optimizer: Any


class AfterStep(Protocol):
    """Called after each optimizer step, by every process; may change weights in place.

    Gives numbers to be recorded; a sequence of floats under "norms" is only drawn. If it has
    `state_dict() -> dict` of tensors and JSON values and `load_state_dict`, they are saved: those
    of the first process, for all. Sharded weights are DTensors here: see `penalties.over_shards`.
    """

    def __call__(self, model: Any, step: Step) -> Mapping[str, Any]:
        """Take a step of its own."""
        ...


@dataclass(frozen=True)
class Trained:
    """What became of the run; the chosen weights are in the model. Losses in nats per token."""

    steps: int
    tokens: int
    seconds: float
    chosen: int  # the step that the weights are of
    first: float | None  # validation loss before the first step
    validation: float | None  # of the chosen weights
    resumed: int | None  # the step that this process went on from
    warnings: tuple[str, ...] = ()


def train(
    model: Any,
    blocks: Blocks,
    *,
    loss: Loss,
    settings: Settings,
    validation: Blocks | None = None,
    before_step: Callable[[Any, Step], None] | None = None,
    after_step: AfterStep | None = None,
    state: Path | None = None,
    made_by: Mapping[str, Any] | None = None,
    rows: Path | None = None,
    logs: Path | None = None,
    trackers: Sequence[str] | None = None,
    console: Console | None = None,
    what: str = "Training",
    expected_processes: int | None = None,
    sharded: bool = False,
) -> Trained:
    """Train all parameters that require gradients, in place.

    `loss` gives a sum over the targets of a batch; it is divided by the targets of the whole step,
    over all micro-batches and processes. `before_step` sees the gradients before they are clipped.
    With a `state` folder the run goes on from the state that it holds, to the same weights bit for
    bit on CPU (same number of threads); `made_by` is what else has to be the same for that: the
    recipe, the model. `rows` is a file of one JSON line per step. `trackers` by name, None for
    tensorboard where it is installed and `logs` is given. Seeds torch's generator.

    With several processes each is given the whole model, and has the whole result in the end. In
    between, DDP keeps a copy in each; `sharded` (FSDP2) keeps 1/n of weights, gradients and moments
    in each, and the steps of one's own see a twin of the model. If `train` then raises, the given
    model is left empty; a state holds whole tensors, and goes on with or without `sharded`.

    Raises BadInput for too few blocks, unfit weights, a full disk or a state of something else,
    and NarrowError where the loss or gradient is not finite or processes are missing.
    """
    chosen = tracker_names(trackers, logs)
    device = next(model.parameters()).device
    # A model too large for one GPU is given on the CPU, and only its shards go to the GPUs.
    on_cpu = device.type == "cpu" and not (sharded and torch.cuda.is_available())
    accelerator = Accelerator(cpu=on_cpu, log_with=chosen or None, project_dir=logs and str(logs))
    check_processes(accelerator.num_processes, expected_processes)
    run = _Run(
        model, blocks, loss, settings, validation, before_step, after_step, state, made_by or {},
        rows, accelerator, sharded,
    )
    if chosen:
        accelerator.init_trackers("llm-narrow", run.made_by_text())
    warnings = run.restore()
    begun = run.step
    visible = console if accelerator.is_main_process else None
    for warning in warnings if visible else ():
        assert visible is not None
        visible.print(warning, highlight=False)
    with training(run.model, settings), watching(visible, what, run.steps, done=begun) as tell:
        run.go(tell)
    for tracker in accelerator.trackers:
        tracker.finish()
    best = run.best if settings.choose == "best" else None
    if best is not None and best.step != run.step:
        run.take(best)
    if run.sharded:
        processes.give_back(run.model, model)
    return Trained(
        run.step, run.step * run.tokens_per_step, run.seconds(),
        chosen=run.step if best is None else best.step,
        first=run.first, validation=run.latest if best is None else best.loss,
        resumed=begun or None, warnings=tuple(warnings),
    )


class _Run:
    """One run: what it is given, and how far it is."""

    def __init__(
        self, model: Any, blocks: Blocks, loss: Loss, settings: Settings,
        validation: Blocks | None, before_step: Any, after_step: Any, state: Path | None,
        made_by: Mapping[str, Any], rows: Path | None, accelerator: Any, sharded: bool,
    ) -> None:  # fmt: skip
        self.blocks, self.settings = blocks, settings
        self.validation, self.before_step, self.after_step = validation, before_step, after_step
        self.state, self.rows, self.accelerator = state, rows, accelerator
        self.processes: int = accelerator.num_processes
        count, length = blocks.tokens.shape
        self.blocks_per_step = settings.batch_size * settings.accumulation * self.processes
        if count < self.blocks_per_step:
            raise BadInput(
                f"One step takes {self.blocks_per_step} blocks of {length} tokens, and there are "
                f"{count}. Give more data, or a smaller batch or accumulation."
            )
        self.tokens_per_step = self.blocks_per_step * length
        self.steps = math.ceil(settings.tokens / self.tokens_per_step)
        rates = [settings.rate(n, self.steps) for n in range(self.steps, 0, -1)]
        self.lr_left = [*reversed([*accumulate(rates)]), 0.0]  # after 0, 1, … steps
        check_weights(learned(model))
        self.device: torch.device = accelerator.device
        self.sharded = sharded and self.processes > 1
        self.wrapped: Any = (
            processes.shard(model, loss, device=self.device, bf16=settings.bf16)
            if self.sharded
            else accelerator.prepare_model(WithLoss(model, loss))
        )
        self.model = self.wrapped.model if self.sharded else model
        self.params = learned(self.model)
        kept = self.model.state_dict().keys()
        self.buffers = {n: b for n, b in self.model.named_buffers() if n in kept}
        self.optimizer = adamw(self.params, settings)
        self.made_by = {
            **{k: v for k, v in asdict(settings).items() if k not in TIMING},
            "processes": self.processes,
            "blocks.sha256": blocks.sha256,
            "validation.sha256": validation and validation.sha256,
            **made_by,
        }
        self.step = 0
        self.best: Best | None = None
        self.first: float | None = None
        self.latest: float | None = None
        self.unseen: float | None = None  # a validation that `after_step` was not told of
        self.before, self.started = 0.0, time.monotonic()
        self.saved = time.monotonic()

    def made_by_text(self) -> dict[str, str]:
        """For trackers, some of which take nothing but text and numbers."""
        return {key: str(value) for key, value in self.made_by.items()}

    def seconds(self) -> float:
        """Spent on the run, by the processes before this one too."""
        return self.before + time.monotonic() - self.started

    def go(self, tell: Tell) -> None:
        """All steps that are left."""
        if self.step == 0 and self.validation is not None:
            self.first = self._validate()
            self._record({"step": 0, "tokens": 0, "validation": self.first}, (), tell)
        while self.step < self.steps:
            began = time.monotonic()
            row, norms, due = self._advance()
            taken = time.monotonic() - began
            due_validation = self.step % self.settings.evaluate_every == 0
            validated = self.validation is not None and (due_validation or self.step == self.steps)
            row["tokens_per_second"] = round(self.tokens_per_step / taken, 1)
            row["validation"] = self._validate() if validated else None
            self._record(row, norms, tell)
            if self.state is not None and (due or validated or self.step == self.steps):
                self._save()

    def _advance(self) -> tuple[dict[str, Any], Sequence[float], bool]:
        """One optimizer step."""
        s, n = self.settings, self.step + 1
        due = time.monotonic() - self.saved > s.save_every_minutes * 60
        summed = torch.stack([self._gradients(n), torch.tensor(float(due), device=self.device)])
        if self.processes > 1:
            summed = self.accelerator.reduce(summed, "sum")
        loss, anyone_due = summed.tolist()
        step = Step(
            n, self.steps, s.rate(n, self.steps),
            self.lr_left[n], loss, self.unseen, self.optimizer,
        )
        if self.before_step is not None:
            self.before_step(self.model, step)
        limit = math.inf if s.clip is None else s.clip
        clipped = self.accelerator.clip_grad_norm_(self.params.values(), limit)
        norm = float(processes.whole(clipped))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimizer.zero_grad()
            raise not_finite(n, self.steps, loss, norm, s.lr, self.state)
        for group in self.optimizer.param_groups:
            group["lr"] = step.lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        facts = dict(self.after_step(self.model, step)) if self.after_step else {}
        norms = facts.pop("norms", ())
        self.step, self.unseen = n, None
        row = {
            "step": n, "tokens": n * self.tokens_per_step, "loss": loss, "validation": None,
            "lr": step.lr, "gradient_norm": norm, "tokens_per_second": None, **facts,
        }
        return row, norms, anyone_due > 0

    def _gradients(self, step: int) -> Tensor:
        """Gradients of the mean loss over the step; this process' part of that mean, ()."""
        s, rank = self.settings, self.accelerator.process_index
        share = s.batch_size * s.accumulation
        begin = (step - 1) * self.blocks_per_step + rank * share
        order = [self._block(begin + k) for k in range(share)]
        targets = self.blocks_per_step * (self.blocks.tokens.shape[1] - 1)
        total = torch.zeros((), device=self.device)
        for start in range(0, share, s.batch_size):
            tokens = self.blocks.tokens[order[start : start + s.batch_size]].long()
            # Shards are too small to hold a gradient that is not yet added up and cut.
            adds_up = self.sharded or start + s.batch_size == share
            with nullcontext() if adds_up else self.accelerator.no_sync(self.wrapped):
                with self._precision():
                    mean = self.wrapped(tokens.to(self.device)) / targets
                # DDP and FSDP2 take the mean over processes, where the sum is wanted.
                self.accelerator.backward(mean * self.processes)
            total += mean.detach()
        return total

    def _block(self, place: int) -> int:
        count = len(self.blocks.tokens)
        return order_of_blocks(count, self.settings.seed, place // count)[place % count]

    def _precision(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16)

    @torch.no_grad()
    def _validate(self) -> float:
        """The language loss on the validation blocks, whatever is trained on; keeps the best."""
        assert self.validation is not None
        batches = self.validation.batches(self.settings.batch_size)
        mine = processes.share(batches)
        # Shards are gathered by all processes or none: who has no batch left repeats one.
        idle = self.sharded and len(mine) * self.processes < len(batches)
        self.model.eval()
        total = 0.0
        for k, batch in enumerate([*mine, *batches[:idle]]):
            with self._precision():
                loss = self._language_loss(batch.to(self.device))
            total += float(loss) if k < len(mine) else 0.0
        self.model.train()
        if self.sharded:
            self.wrapped.reshard()  # the root stays whole after a forward without a backward
        if self.processes > 1:
            summed = torch.tensor(total, dtype=torch.float64, device=self.device)
            total = float(self.accelerator.reduce(summed, "sum"))
        count, length = self.validation.tokens.shape
        mean = total / (count * (length - 1))
        self.latest = self.unseen = mean
        if math.isfinite(mean) and (self.best is None or mean < self.best.loss):
            held = self.best.weights if self.best else {n: None for n in self.params}
            if self.settings.choose == "best":
                self.best = Best(self.step, mean, processes.copied(self.params, held))
        return mean

    def _language_loss(self, tokens: Tensor) -> Tensor:
        if self.sharded:
            found: Tensor = self.wrapped(tokens, language_loss)
            return found
        return language_loss(self.model, tokens)

    @torch.no_grad()
    def take(self, best: Best) -> None:
        """Put the best weights into the model."""
        for name, p in self.params.items():
            processes.own(p).copy_(best.weights[name])

    def _save(self) -> None:
        assert self.state is not None
        drawn = gather_object([states.random_state()])
        weights = processes.gathered({**self.params, **self.buffers})
        optimizer = processes.gathered(states.optimizer_tensors(self.optimizer, self.params))
        best = self.best
        if best is not None and best.step != self.step:  # else it is in `weights`
            parts = {n: processes.joined(best.weights[n], p) for n, p in self.params.items()}
            best = replace(best, weights=processes.gathered(parts))
        if self.accelerator.is_main_process:
            facts = {
                "first": self.first, "latest": self.latest, "unseen": self.unseen,
                "seconds": self.seconds(),
            }
            after: dict[str, Any] = getattr(self.after_step, "state_dict", dict)()
            snapshot = Snapshot(self.step, weights, optimizer, best, after, drawn, facts)
            states.save(self.state, snapshot, self.made_by)
        self.accelerator.wait_for_everyone()
        self.saved = time.monotonic()

    def restore(self) -> list[str]:
        """Go on from the newest state, if there is one. Gives what is to be told about it."""
        found = states.Found() if self.state is None else states.find(self.state, self.made_by)
        held = found.snapshot
        if held is not None:
            states.restore_weights({**self.params, **self.buffers}, held.weights)
            states.restore_optimizer(self.optimizer, self.params, held.optimizer)
            states.restore_random(held.random[self.accelerator.process_index])
            if hasattr(self.after_step, "load_state_dict"):
                self.after_step.load_state_dict(dict(held.after))
            self.step, self.best = held.step, held.best
            if held.best is not None:
                parts = {n: processes.cut(held.best.weights[n], p) for n, p in self.params.items()}
                mine = processes.copied(parts, {n: None for n in parts})
                self.best = replace(held.best, weights=mine)
            self.first, self.latest = held.facts["first"], held.facts["latest"]
            self.unseen, self.before = held.facts["unseen"], held.facts["seconds"]
        else:
            torch.manual_seed(self.settings.seed + self.accelerator.process_index)
        if self.rows is not None and self.accelerator.is_main_process:
            cut_rows(self.rows, self.step if held else -1)
        return found.warnings

    def _record(self, row: dict[str, Any], norms: Sequence[float], tell: Tell) -> None:
        tell(row, norms)
        self.accelerator.log({k: v for k, v in row.items() if _is_number(v)}, step=row["step"])
        if self.rows is not None and self.accelerator.is_main_process:
            with self.rows.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")


@lru_cache(maxsize=2)
def order_of_blocks(count: int, seed: int, epoch: int) -> list[int]:
    """The order of the blocks in an epoch."""
    generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
