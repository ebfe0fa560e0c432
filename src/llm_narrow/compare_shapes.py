"""What a comparison is made of: its methods, the shape of each size, its cells and their recipes.

A cell is one method at one size with one seed. All methods of a size train a model of exactly the
same shape: that of the plan by which the whole model would be narrowed to the size.
"""

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import checkpoint, cost
from . import recipe as recipes
from .errors import BadInput, NarrowError, TargetOutOfReach, UnknownName, problems
from .inputs import Inputs
from .plan import Plan, by_parameters
from .recipe import Kind, Recipe
from .scores import CRITERIA

# Method -> whether it begins with fresh weights. What else tells it from others is in `recipe_of`.
METHODS: dict[str, bool] = {
    "oneshot": False,  # the best-scored units of the whole model, refitted
    "lasso": False,  # units drawn to zero by training first, then as above
    "random": False,  # units drawn by lot, exact in number, refitted
    "distilled": True,  # learns from the whole model
    "scratch": True,  # learns from the text alone
}


@dataclass(frozen=True)
class Shape:
    """The model that a size stands for. FLOPs are of a forward pass over one token of a block."""

    size: str  # as it was asked for
    kinds: tuple[Kind, ...]  # what may be removed to get there
    config: Any  # of the stock class
    parameters: int
    without_embeddings: int
    flops: float


@dataclass(frozen=True)
class Cell:
    """One run of the comparison."""

    method: str
    size: str
    seed: int

    @property
    def name(self) -> str:
        """That of its run folder."""
        return f"{self.method}-{_plain(self.size)}-seed-{self.seed}"


@dataclass(frozen=True)
class Attempt:
    """A learning rate tried for a method and size, on a share of the tokens."""

    method: str
    size: str
    lr: float

    @property
    def name(self) -> str:
        """That under which its result is kept."""
        return f"sweep-{self.method}-{_plain(self.size)}-lr-{self.lr:g}"


@dataclass(frozen=True)
class Asked:
    """What a comparison was asked for, checked."""

    sizes: tuple[str, ...]
    methods: tuple[str, ...]
    lrs: tuple[float, ...]
    seeds: int
    tokens: int
    sweep_share: float

    @classmethod
    def of(
        cls, *, sizes: str | Sequence[str | int], methods: str | Sequence[str],
        lrs: str | Sequence[float], seeds: int, tokens: int, sweep_share: float,
    ) -> "Asked":  # fmt: skip
        """From lists, or text with commas. Raises BadInput with all that is wrong."""
        named = [str(size) for size in _listed(sizes)]
        chosen = [str(method) for method in _listed(methods)]
        found = [
            "--sizes are shares of the parameters above 0 and below 100% (70%) or numbers (90M), "
            f"got {size!r}"
            for size in named
            if not _is_size(size)
        ]
        found += [str(UnknownName("method", m, METHODS)) for m in chosen if m not in METHODS]
        rates: list[float] = []
        for text in _listed(lrs):
            try:
                rates.append(float(text))
            except ValueError:
                rates.append(math.nan)
            if not 0 < rates[-1] < math.inf:
                found.append(f"--lrs must be numbers above 0, got {text!r}")
        lists: dict[str, list[Any]] = {"--sizes": named, "--methods": chosen, "--lrs": rates}
        for flag, values in lists.items():
            if not values or len({*values}) < len(values):
                found.append(f"{flag} must be at least one, none of them twice, got {values}")
        if seeds < 1:
            found.append(f"--seeds must be at least 1, got {seeds}")
        if not 0 < sweep_share <= 1:
            found.append(f"--sweep-share must be above 0 and at most 1, got {sweep_share}")
        if found:
            raise BadInput(found[0]) if len(found) == 1 else problems("the comparison", found)
        return cls(tuple(named), tuple(chosen), tuple(rates), seeds, tokens, sweep_share)

    def cells(self, first_seed: int) -> list[Cell]:
        """All runs, in the order in which they are done."""
        return [
            Cell(method, size, first_seed + n)
            for size in self.sizes
            for method in self.methods
            for n in range(self.seeds)
        ]

    def attempts(self, cell: Cell) -> list[Attempt]:
        """What is tried before the runs of a method and size; nothing for a single rate."""
        rates = self.lrs if len(self.lrs) > 1 else ()
        return [Attempt(cell.method, cell.size, lr) for lr in rates]


def shapes_of(recipe: Recipe, start: Inputs, sizes: Sequence[str]) -> dict[str, Shape]:
    """The shape of each size; what may go is what the recipe names, else neurons, where they do
    not suffice heads too.

    Raises TargetOutOfReach with all sizes that cannot be reached and the least that can, and
    BadInput for two sizes of one shape and for shapes that no stock config has.
    """
    found: dict[str, Shape] = {}
    wrong: list[str] = []
    given = recipe.prune.kinds or isinstance(recipe.prune.sparsity, dict)
    there = {g.kind for g in start.all_groups}
    for size in sizes:
        if given or "heads" not in there:
            tried = [recipe.prune.chosen_kinds]
        else:
            tried = [recipe.prune.chosen_kinds, ("neurons", "heads")]
        for kinds in tried:
            try:
                found[size] = _shape(recipe, start, size, kinds)
                break
            except TargetOutOfReach as error:
                reason = str(error)
        else:
            wrong.append(f"--sizes {size}: {reason}")
    if wrong:
        raise TargetOutOfReach("\n".join(wrong))
    last = {shape.parameters: shape.size for shape in found.values()}
    for shape in found.values():
        if (same := last[shape.parameters]) != shape.size:
            raise BadInput(
                f"--sizes {shape.size} and {same} come to the same {shape.parameters:,} "
                "parameters. Leave one out."
            )
    return found


def recipe_of(
    recipe: Recipe, asked: Asked, shape: Shape, method: str, *, seed: int, lr: float,
    share: float = 1.0,
) -> Recipe:  # fmt: skip
    """The recipe of a run on `share` of the tokens; of the lasso's run they include its own.

    Raises BadInput where they leave nothing for the recovery.
    """
    data = copy.deepcopy(recipe.resolved())
    lasso = method == "lasso"
    per_step = tokens_per_step(recipe)
    steps = math.ceil(share * asked.tokens / per_step)
    first = max(1, round(share * recipe.lasso.tokens / per_step)) if lasso else 0
    if first >= steps:
        raise BadInput(
            f"The lasso's {recipe.lasso.tokens:,} tokens are part of the {asked.tokens:,} of its "
            "runs, and leave none for the recovery. Give fewer --lasso-tokens, or more --tokens."
        )
    data["seed"] = seed
    data["prune"].pop("sparsity", None)
    data["prune"] |= {
        "target_params": shape.size, "kinds": list(shape.kinds),
        "method": "lasso" if lasso else "oneshot",
    }  # fmt: skip
    if lasso:
        data["lasso"] |= {"tokens": first * per_step, "lr": lr}
    data["recover"] |= {"tokens": (steps - first) * per_step, "lr": lr}
    data["measure"] |= {"speed": False, "report": False}  # `bench` and `report` do, of any run
    if method == "random":
        data["score"]["criterion"] = "random"
    if method == "scratch":
        data["train"]["distill"] = "none"
    elif method == "distilled" and recipe.train.distill == "none":
        data["train"]["distill"] = "teacher"
    return recipes.of(data, criteria=CRITERIA)


def tokens_per_step(recipe: Recipe) -> int:
    """True tokens of an optimizer step."""
    return recipe.blocks.batch_size * recipe.train.accumulation * recipe.blocks.length


def trained_tokens(recipe: Recipe) -> tuple[int, int]:
    """What a run of the recipe trains on: in the lasso, and after it."""
    lasso = recipe.lasso.tokens if recipe.prune.method == "lasso" else 0
    return lasso, recipe.recover.tokens


def fresh(shape: Shape, seed: int) -> Any:
    """A model of the shape with new weights, as its architecture draws them; float32."""
    torch.manual_seed(seed)
    model = checkpoint.STOCK.from_config(copy.deepcopy(shape.config), dtype=torch.float32)
    return check_shape(model.eval(), shape)


def check_shape(model: Any, shape: Shape) -> Any:
    """The model. Raises NarrowError where it is not of the shape, which would not be fair."""
    if (own := cost.size(model).parameters) != shape.parameters:
        raise NarrowError(
            f"A model of size {shape.size} has {own:,} parameters instead of "
            f"{shape.parameters:,}. Please report this, with the command."
        )
    return model


def _shape(recipe: Recipe, start: Inputs, size: str, kinds: tuple[Kind, ...]) -> Shape:
    model = start.loaded.model
    whole = cost.size(model).parameters
    plan: Plan = by_parameters(
        model,
        start.all_groups,
        {g.name: torch.zeros(g.size) for g in start.all_groups},  # widths are even: not by score
        target=recipes.target(size, whole),
        kinds=kinds,
        multiple=recipe.prune.multiple,
    )
    if plan.parameters_after == plan.parameters_before:
        raise BadInput(f"--sizes {size} removes nothing. Ask for fewer parameters.")
    config = checkpoint.uniform_config(model.config, plan.groups, plan.keep, plan.keep)
    if config is None:
        raise BadInput(
            f"No stock model has the shape that {' and '.join(kinds)} of {start.loaded.name} leave "
            f"at {size}, so that none can be trained from fresh weights. Try --kinds neurons."
        )
    with torch.device("meta"):
        skeleton = checkpoint.STOCK.from_config(copy.deepcopy(config))
    counted = cost.size(skeleton)
    flops = forward_flops(skeleton, recipe)
    shape = Shape(size, kinds, config, plan.parameters_after, counted.without_embeddings, flops)
    check_shape(skeleton, shape)
    return shape


def forward_flops(model: Any, recipe: Recipe) -> float:
    """Of one token of a block, which on average looks back at half of it."""
    return cost.flops_per_token(model, context=recipe.blocks.length // 2)


def _listed(found: Any) -> list[Any]:
    if isinstance(found, str):
        return [part.strip() for part in found.split(",") if part.strip()]
    return list(found)


def _is_size(size: str) -> bool:
    if not re.fullmatch(r"\d+(\.\d+)?(%|[kKmMbB])?", size):
        return False
    if size.endswith("%"):
        return 0 < float(size[:-1]) < 100
    return recipes.target(size, 0) > 0


def _plain(size: str) -> str:
    return size.replace("%", "-percent")
