"""One training of a relearning audit: a subject with a seed, or an attempt at a learning rate.

All subjects learn the same blocks in the same order by the same loop. Blocks of the calibration
part choose the learning rate; held-out text is looked at on the way, and nothing follows from it.
"""

import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console

from . import benchmark, channels, checkpoint, cost, depth, inputs, measure, work
from .blocks import Blocks
from .compare_cells import shuffled_back, stream
from .compare_shapes import tokens_per_step
from .domains import Domain
from .errors import NarrowError
from .families import find_groups
from .losses import language_loss
from .measure import DocumentSums
from .models import Loaded
from .progress import Track
from .recipe import Recipe
from .relearn_answers import Subject
from .settings import Settings
from .train import Step, Trained, train
from .work import Work


@dataclass(frozen=True)
class Asked:
    """What an audit was asked for, checked. `points` are looks at held-out text on the way."""

    tokens: int
    lrs: tuple[float, ...]
    seeds: int
    sweep_share: float
    points: int


@dataclass(frozen=True)
class Ground:
    """What all trainings of an audit share: three parts of the domain, each for one use."""

    asked: Asked
    recipe: Recipe
    domain: Domain
    train: Blocks
    choice: Blocks  # of the calibration part: what learning rates are chosen by
    test: Blocks  # held out: what the curves are of
    first: DocumentSums | None  # of the whole model before any training, on the test blocks
    work: Work
    console: Console
    track: Track


class Looks:
    """A step of one's own that measures at given steps, and remembers what it found."""

    def __init__(self, places: Sequence[int], look: Callable[[Any, int], dict[str, Any]]) -> None:
        """`look` gives a row of the model after so many steps."""
        self.places, self.look = frozenset(places), look
        self.rows: list[dict[str, Any]] = []

    def __call__(self, model: Any, step: Step) -> dict[str, Any]:
        """Look, if this is a place to."""
        if step.number in self.places:
            self.rows.append(self.look(model, step.number))
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training has to know."""
        return {"rows": self.rows}

    def load_state_dict(self, held: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.rows = list(held["rows"])


def steps_of(recipe: Recipe, tokens: float) -> int:
    """Optimizer steps that the tokens make."""
    return max(1, math.ceil(tokens / tokens_per_step(recipe)))


def places(steps: int, points: int) -> list[int]:
    """Steps at which held-out text is looked at: the first, the last, and evenly in ratio between.

    >>> places(100, 5)
    [1, 3, 10, 32, 100]
    """
    return [int(n) for n in np.unique(np.geomspace(1, steps, points).round())]


def file_name(name: str) -> str:
    """A name that a file can have."""
    return re.sub(r"[^\w.-]+", "-", name)


def cell_name(subject: Subject, seed: int) -> str:
    """That under which the rows of a subject and seed are kept."""
    return f"{file_name(subject.name)}-seed-{seed}"


def attempt_name(subject: Subject, lr: float) -> str:
    """That under which the result of an attempt is kept."""
    return f"sweep-{file_name(subject.name)}-lr-{lr:g}"


def attempted(ground: Ground, subject: Subject, lr: float) -> dict[str, Any]:
    """What a learning rate comes to on its share of the tokens; held-out text is not looked at.

    A rate at which the loss is not finite has no validation loss, and why is told.
    """
    name = attempt_name(subject, lr)
    left = _begun(ground, name)
    if (known := ground.work.part(name)) is not None:
        left.done()  # stopped right at its end
        return known[1]
    facts: dict[str, Any] = {"lr": lr, "validation": None}
    loaded = begin(ground.recipe, subject, ground.recipe.seed, ground.track)
    steps = steps_of(ground.recipe, ground.asked.sweep_share * ground.asked.tokens)
    try:
        trained = _trained(ground, loaded, subject, ground.recipe.seed, lr, steps, left, None)
    except NarrowError as error:
        if type(error) is not NarrowError:  # what the user can mend is no matter of the rate
            raise
        facts["error"] = str(error)
    else:
        finite = trained.validation is not None and math.isfinite(trained.validation)
        facts |= {"validation": trained.validation} if finite else {"error": "loss not finite"}
        facts |= {"tokens": trained.tokens, "seconds": round(trained.seconds, 1)}
    ground.work.finish(name, {}, facts)
    left.done()
    return facts


def learnt(ground: Ground, subject: Subject, seed: int, lr: float) -> dict[str, Any]:
    """Train a subject on all tokens; its rows, before any training and at each look."""
    name = cell_name(subject, seed)
    left = _begun(ground, name)
    if (known := ground.work.part(name)) is not None:
        left.done()
        return known[1]
    loaded = begin(ground.recipe, subject, seed, ground.track)
    steps = steps_of(ground.recipe, ground.asked.tokens)

    def look(model: Any, step: int) -> dict[str, Any]:
        return looked(ground, subject, model, loaded, seed, lr, step)

    if (before := left.part("before")) is None:
        row = look(loaded.model, 0)
        left.finish("before", {}, {"row": row})
    else:
        row = before[1]["row"]
    looks = Looks(places(steps, ground.asked.points), look)
    trained = _trained(ground, loaded, subject, seed, lr, steps, left, looks)
    facts = {
        "rows": [row, *looks.rows], "lr": lr, "tokens": trained.tokens,
        "seconds": round(trained.seconds, 1),
    }  # fmt: skip
    curves = ground.work.place / "curves"
    curves.mkdir(exist_ok=True)
    shutil.copyfile(left.folder / "relearn.jsonl", curves / f"{name}.jsonl")
    ground.work.finish(name, {}, facts)
    left.done()
    return facts


def begin(recipe: Recipe, subject: Subject, seed: int, track: Track) -> Loaded:
    """The model that a subject begins with: as it was saved, or of its shape with new weights."""
    loaded = inputs.model_of(recipe, subject.model, track=track)
    if subject.kind != "scratch":
        return loaded
    model = _fresh(loaded, seed)
    if (own := cost.size(model).parameters) != subject.parameters:
        raise NarrowError(
            f"Fresh weights of the shape of {subject.model} are {own:,} parameters instead of "
            f"{subject.parameters:,}. Please report this, with the command."
        )
    device = inputs.device_of(recipe.device)
    return Loaded(model.eval().to(device), loaded.tokenizer, loaded.name, loaded.folder, "")


def sums_of(recipe: Recipe, model: Any, blocks: Blocks, track: Track) -> DocumentSums:
    """The model on the test blocks."""
    return benchmark.document_sums(model, blocks, recipe, track)


def looked(
    ground: Ground, subject: Subject, model: Any, loaded: Loaded, seed: int, lr: float, step: int
) -> dict[str, Any]:
    """A row of rows.jsonl: those of `rows`, and whose, after how many tokens, at which rate."""
    sums = sums_of(ground.recipe, model, ground.test, ground.track)
    row = measure.row(
        subject.name, model, sums, name=subject.model, sha256=loaded.sha256,
        domain=ground.domain.name, part="held_out", first=ground.first, seed=ground.recipe.seed,
    )  # fmt: skip
    about = {"subject": subject.name, "kind": subject.kind, "method": subject.method}
    trained = step * tokens_per_step(ground.recipe)
    return {**row.to_dict(), **about, "seed": seed, "lr": lr, "trained": trained}


def _trained(
    ground: Ground, loaded: Loaded, subject: Subject, seed: int, lr: float, steps: int, left: Work,
    looks: Looks | None,
) -> Trained:  # fmt: skip
    recipe, t = ground.recipe, ground.recipe.train
    tokens = steps * tokens_per_step(recipe)
    settings = Settings(
        tokens, lr=lr, schedule=t.schedule, warmup=t.warmup, batch_size=recipe.blocks.batch_size,
        accumulation=t.accumulation, clip=t.clip, weight_decay=t.weight_decay,
        bf16=inputs.bf16(recipe), checkpointing=t.checkpointing, evaluate_every=t.evaluate_every,
        save_every_minutes=t.save_every_minutes, seed=seed, choose="last",
    )  # fmt: skip
    # All of the budget, of which an attempt sees the beginning.
    seen = stream(ground.train, tokens, seed)
    return train(
        loaded.model, shuffled_back(seen, seed), loss=language_loss, settings=settings,
        validation=ground.choice, after_step=looks, state=left.folder / "state",
        rows=left.folder / "relearn.jsonl", logs=left.folder / "logs", trackers=t.trackers,
        made_by={
            "subject": subject.name, "model": loaded.sha256, "test": ground.test.sha256,
            "points": ground.asked.points,
        },
        console=ground.console, what=f"Relearning: {subject.name}",
    )  # fmt: skip


def _begun(ground: Ground, name: str) -> Work:
    """The unfinished training of a name, begun or gone on with."""
    place = ground.work.folder / name
    folder = work.unfinished(place)
    resumed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if resumed:
        ground.console.print(f"Going on with {folder}.")
    return Work(folder, place, resumed)


def _fresh(loaded: Loaded, seed: int) -> Any:
    """A model of the same shape with new weights, as its architecture draws them; float32."""
    folder = loaded.folder
    uneven = checkpoint.layout(folder) == "uneven"
    config = checkpoint.uneven_config(folder) if uneven else loaded.model.config
    torch.manual_seed(seed)
    model = channels.skeleton(config, dtype=torch.float32)
    if uneven:
        depth.take_out(model, find_groups(model), checkpoint.read_keep(folder / checkpoint.KEEP))
    return model
