"""What a run trains and on what: the lasso before the removal, the recovery after it.

Both learn from the same text with the same settings, each from blocks of its own; what one part
left is kept in the unfinished run's folder, so that a run that was stopped goes on from there.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from . import inputs, processes, trimming, work
from .blocks import Blocks
from .claims import claimed
from .distill import cached_distill_loss, cached_teacher, distill_loss
from .errors import BadInput, NarrowError
from .inputs import Inputs
from .lasso import Gradient, Proximal, Timetable
from .lora import merged, with_lora
from .losses import Loss, language_loss
from .penalties import PerUnit, unit_norms, unit_weights, weights_from_scores, zero_groups
from .plan import Plan
from .progress import Track
from .recipe import Recipe
from .settings import Settings
from .strength import Fixed, LossDriven, Shrinking, Target, removal_places
from .train import Trained, train
from .units import Group, Keep, Kind, Scores, mask, remove
from .work import Work


@dataclass(frozen=True)
class Text:
    """Blocks of the training part; the validation blocks share no document with the others."""

    lasso: Blocks | None
    recover: Blocks | None
    validation: Blocks

    def tokens(self) -> dict[str, int]:
        """How many tokens of text each part has."""
        named = {"lasso": self.lasso, "recover": self.recover, "validation": self.validation}
        return {name: b.tokens.numel() for name, b in named.items() if b is not None}


@dataclass(frozen=True)
class Lessons:
    """What the parts of a run are trained with, whatever it is that they train.

    `shared` says where several runs keep what a cached teacher predicts, and on which blocks, of
    which those of each run are some. Without it each part of a run has a cache of its own.
    """

    start: Inputs
    recipe: Recipe
    text: Text
    work: Work
    console: Console
    track: Track
    shared: tuple[Path, Blocks] | None = None


@dataclass(frozen=True)
class Aligned:
    """What the lasso left: which units are zero, and the norms of all before and after."""

    keep: Keep
    norms: tuple[PerUnit, PerUnit]
    facts: Mapping[str, Any]


def text(start: Inputs, recipe: Recipe, *, track: Track) -> Text:
    """The blocks of each part. Where the text is short, recovery sees that of the lasso again.

    Raises BadInput where there is not enough for one step and the validation.
    """
    packed = inputs.blocks_of(start.loaded, start.domain, "train", recipe, track=track)
    count, length = packed.tokens.shape
    apart = -(-recipe.train.validation_tokens // length)
    free = max(0, count - apart)
    # Documents lie end to end: only the last free blocks can share one with the validation.
    while free > 0 and packed.documents[free - 1, -1] == packed.documents[count - apart, 0]:
        free -= 1
    per_step = recipe.blocks.batch_size * recipe.train.accumulation * processes.count()
    if free < per_step:
        raise BadInput(
            f"The training part of {start.domain.name} has {count} blocks of {length} tokens. One "
            f"step takes {per_step}, beside {apart} "
            "for validation. Give more text, or a smaller --batch-size or --validation-tokens."
        )
    rest = packed.only(torch.arange(free)).take(free * length, seed=recipe.seed)
    first = -(-recipe.lasso.tokens // length) if recipe.prune.method == "lasso" else 0
    second = -(-recipe.recover.tokens // length)
    begin = first if first + second <= free else 0
    return Text(
        rest.only(torch.arange(min(first, free))) if first else None,
        rest.only(torch.arange(begin, min(begin + second, free))) if second else None,
        packed.only(torch.arange(count - apart, count)),
    )


def align(
    lessons: Lessons, scores: Scores, plan: Plan, kinds: Sequence[Kind]
) -> Aligned:
    """Draw the units that `plan` would remove to zero, in place, by the lasso of the recipe."""
    model = lessons.start.loaded.model
    groups = inputs.groups_of(plan.groups, kinds)
    params = dict(model.named_parameters())
    before = {name: norm.cpu().clone() for name, norm in unit_norms(groups, params).items()}
    held = lessons.work.part("aligned")
    if held is not None:
        work.fill(model, held[0])
        facts = held[1]
    else:
        facts = _drawn(lessons, groups, scores, plan, kinds)
        lessons.work.finish("aligned", work.weights(model), facts)
    params = dict(model.named_parameters())
    after = {name: norm.cpu().clone() for name, norm in unit_norms(groups, params).items()}
    return Aligned(zero_groups(groups, params), (before, after), facts)


def recover(lessons: Lessons) -> dict[str, Any]:
    """Train what is left, in place, as the recipe says."""
    model, recipe = lessons.start.loaded.model, lessons.recipe
    blocks, r = lessons.text.recover, recipe.recover
    assert blocks is not None
    held = lessons.work.part("recovered")
    if held is not None:
        work.fill(model, held[0])
        return held[1]
    probe = lessons.text.validation.batches(recipe.blocks.batch_size)[0]
    whole, loss = _loss(lessons, blocks)
    began = _probed(model, probe)
    if r.method == "lora":
        model = with_lora(model, rank=r.lora_rank)
    trained = _trained(lessons, "recover", blocks, loss, r.tokens, r.lr)
    facts = {"method": r.method, **_facts(trained, recipe), "validation_whole": whole}
    if r.method == "lora":
        facts["lora"] = _merge(model, probe, began, learnt=trained.chosen > 0)
    lessons.work.finish("recovered", work.weights(model), facts)
    return facts


def removal_changes(
    model: Any, groups: Sequence[Group], keep: Keep, tokens: Tensor
) -> dict[str, float]:
    """What removing the units of zeros does to the logits of `tokens`, in float32.

    `masked`: silenced in place, which has to be exactly 0; `removed`: with smaller matrices, whose
    sums are rounded in another order. Largest differences relative to the largest logit. Raises
    NarrowError where the first is not 0.
    """
    with torch.no_grad():
        whole = model(tokens).logits
        narrow = copy.deepcopy(model)
        mask(narrow, groups, keep)
        masked = float((narrow(tokens).logits - whole).abs().max())
        remove(narrow, groups, keep)
        largest = float((narrow(tokens).logits - whole).abs().max())
    if masked != 0:
        raise NarrowError(f"Units of zeros are not silent: logits change by {masked:.3g}.")
    return {"masked": masked, "removed": largest / float(whole.abs().max())}


def _drawn(
    lessons: Lessons, groups: Sequence[Group], scores: Scores, plan: Plan, kinds: Sequence[Kind]
) -> dict[str, Any]:
    """Train with the lasso; what is to be told of it."""
    model, recipe = lessons.start.loaded.model, lessons.recipe
    blocks = lessons.text.lasso
    assert blocks is not None
    drawing = _drawing(lessons, groups, scores, plan, kinds, _steps(recipe, recipe.lasso.tokens))
    whole, loss = _loss(lessons, blocks)
    trained = _trained(
        lessons, "lasso", blocks, loss, recipe.lasso.tokens, recipe.lasso.lr, drawing
    )
    keep = zero_groups(groups, dict(model.named_parameters()))
    probe = lessons.text.validation.tokens[:2].long().to(lessons.start.device)
    zero = sum(int((~k).sum()) for k in keep.values())
    return {
        **_facts(trained, recipe), "validation_whole": whole,
        "zero": zero, "units": sum(g.size for g in groups),
        "logits_change": removal_changes(model, groups, keep, probe) if zero else None,
    }  # fmt: skip


def _drawing(
    lessons: Lessons, groups: Sequence[Group], scores: Scores, plan: Plan,
    kinds: Sequence[Kind], steps: int,
) -> Proximal | Timetable | Gradient:  # fmt: skip
    """The lasso of the recipe, as a step of the training."""
    recipe, lasso = lessons.recipe, lessons.recipe.lasso
    params = dict(lessons.start.loaded.model.named_parameters())
    sparsity = plan.sparsity(kinds)
    if lasso.control == "timetable":
        # The last steps are left to the units that stay.
        shrinking = Shrinking(max(1, round(0.75 * steps)), window=max(1, steps // 5))
        return Timetable(groups, removal_places(groups, plan.keep, scores), shrinking)
    if lasso.weights == "scores":
        weights = weights_from_scores(
            scores, groups, sparsity=sparsity, times=unit_weights(groups, params, "size"),
            allocation=recipe.prune.by_score,
        )  # fmt: skip
    else:
        weights = unit_weights(groups, params, lasso.weights)
    units = sum(g.size for g in groups)
    share = sum(int((~plan.keep[g.name]).sum()) for g in groups) / units
    if lasso.control == "target":
        # A move every tenth of the run, or every ten steps of a long one.
        return Proximal(groups, weights, Target(share, steps, max(1, min(10, steps // 10))), share)
    control = (
        Fixed(lasso.strength)
        if lasso.control == "fixed"
        else LossDriven(lasso.strength, every=max(1, steps // 50), warmup=steps // 10, smooth=0.9)
    )
    if lasso.step == "gradient":
        return Gradient(groups, weights, control, lasso.penalty)
    return Proximal(groups, weights, control, share)


def _loss(lessons: Lessons, blocks: Blocks) -> tuple[float | None, Loss]:
    """What is learnt from, and the teacher's own loss on the validation blocks, nats per token."""
    recipe, t, start = lessons.recipe, lessons.recipe.train, lessons.start
    if t.distill == "none":
        return None, language_loss
    name = t.teacher or recipe.model.name
    teacher = inputs.model_of(recipe, name, track=lessons.track)
    trimming.fit(teacher.model, start)
    held = lessons.work.part("teacher-loss")
    if held is None:
        lost = _validated(lessons, teacher.model)
        lessons.work.finish("teacher-loss", {}, {"loss": lost})
    else:
        lost = float(held[1]["loss"])
    if t.distill == "cached":
        own = lessons.work.folder / f"teacher-{blocks.sha256[:12]}", blocks
        folder, asked = lessons.shared or own
        # Processes that share a teacher ask it once; those of one run do it together.
        with claimed(folder.parent, folder.name, wait=True) if lessons.shared else nullcontext():
            cached = cached_teacher(
                teacher.model, asked, folder, k=t.top_k, temperature=t.temperature,
                name=teacher.sha256, batch_size=recipe.blocks.batch_size, bf16=start.bf16,
                track=lessons.track,
            )  # fmt: skip
        return lost, cached_distill_loss(cached, mix=t.mix)
    return lost, distill_loss(
        teacher.model, temperature=t.temperature, mix=t.mix, bf16=start.bf16
    )


def _trained(
    lessons: Lessons, part: str, blocks: Blocks, loss: Loss, tokens: int, lr: float,
    drawing: Proximal | Timetable | Gradient | None = None,
) -> Trained:  # fmt: skip
    folder, recipe, start = lessons.work.folder, lessons.recipe, lessons.start
    t = recipe.train
    settings = Settings(
        tokens, lr=lr, schedule=t.schedule, warmup=t.warmup, batch_size=recipe.blocks.batch_size,
        accumulation=t.accumulation, clip=t.clip, weight_decay=t.weight_decay, bf16=start.bf16,
        checkpointing=t.checkpointing, evaluate_every=t.evaluate_every,
        save_every_minutes=t.save_every_minutes, seed=recipe.seed,
        choose="best" if drawing is None else "last",
    )  # fmt: skip
    return train(
        start.loaded.model, blocks, loss=loss, settings=settings,
        validation=lessons.text.validation,
        before_step=drawing.before if drawing is not None else None, after_step=drawing,
        state=folder / f"{part}-state", rows=folder / f"{part}.jsonl", logs=folder / "logs" / part,
        made_by={"model": start.loaded.sha256, "part": part, "recipe": _settled(recipe)},
        trackers=t.trackers, sharded=t.sharded, console=lessons.console,
        what={"lasso": "Drawing units to zero", "recover": "Recovering"}[part],
    )  # fmt: skip


def _settled(recipe: Recipe) -> dict[str, Any]:
    """What of the recipe has to be the same to go on with a state."""
    return work.Job("prune", "", recipe.resolved()).same()


def _steps(recipe: Recipe, tokens: int) -> int:
    """Optimizer steps that the tokens make."""
    blocks = recipe.blocks.batch_size * recipe.train.accumulation * processes.count()
    return math.ceil(tokens / (blocks * recipe.blocks.length))


def _facts(trained: Trained, recipe: Recipe) -> dict[str, Any]:
    return {
        "tokens": trained.tokens,
        "steps": trained.steps,
        "chosen_step": trained.chosen,
        "validation_first": trained.first,
        "validation": trained.validation,
        "seconds": round(trained.seconds, 1),
        "distill": recipe.train.distill,
    }


def _merge(model: Any, probe: Tensor, began: float, *, learnt: bool) -> dict[str, float]:
    """Add the LoRA products to their weights.

    Raises NarrowError where that changed the loss, or where training had not although weights of
    a later step than the first were the best (`learnt`).
    """
    trained = _probed(model, probe)
    merged(model)
    after = _probed(model, probe)
    if not math.isclose(after, trained, rel_tol=1e-3):
        raise NarrowError(f"Merging LoRA changed the loss from {trained:.4f} to {after:.4f}.")
    if learnt and after == began:
        raise NarrowError(f"LoRA learnt nothing: the loss is {after:.4f} as before.")
    return {"loss_before": began, "loss_trained": trained, "loss_merged": after}


@torch.no_grad()
def _probed(model: Any, tokens: Tensor) -> float:
    """The loss on a few blocks, nats per token."""
    device = next(model.parameters()).device
    return float(language_loss(model, tokens.to(device))) / tokens[:, 1:].numel()


@torch.no_grad()
def _validated(lessons: Lessons, model: Any) -> float:
    blocks, recipe = lessons.text.validation, lessons.recipe
    device = lessons.start.device
    total = 0.0
    for batch in lessons.track(blocks.batches(recipe.blocks.batch_size), "asking the whole model"):
        with torch.autocast(device.type, torch.bfloat16, enabled=lessons.start.bf16):
            total += float(language_loss(model, batch.to(device)))
    return total / blocks.tokens[:, 1:].numel()
