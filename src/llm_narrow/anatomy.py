"""What a model is made of, what can be removed, and what that would save: the command `inspect`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from . import models
from .cost import size
from .families import find_groups, refused_kinds
from .inputs import track_on
from .units import Group, Kind, Params, count, keep_all


@dataclass(frozen=True)
class Removable:
    """The groups of one kind: how many units each has, and what removing one of them saves."""

    kind: Kind
    groups: int
    units: int
    parameters_per_unit: int
    parameters: int
    stock: bool  # whether an even cut of this kind alone has a stock configuration


@dataclass(frozen=True)
class Inspected:
    """What a model is made of."""

    name: str
    sha256: str
    model_type: str
    parameters: int
    parameters_without_embeddings: int
    removable: tuple[Removable, ...]
    groups: tuple[Mapping[str, Any], ...]
    fixed: int  # parameters that belong to no unit
    refused: Mapping[Kind, str]  # kinds that the architecture has and that cannot go, with why

    def facts(self) -> dict[str, Any]:
        """What `--json` prints."""
        return asdict(self)


def inspect(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> Inspected:
    """What the model is made of, what can be removed, and what that would save."""
    loaded = models.load(
        model,
        revision=revision,
        trust_remote_code=trust_remote_code,
        track=track_on(console or Console(quiet=True)),
    )
    groups = find_groups(loaded.model)
    params = dict(loaded.model.named_parameters())
    per_unit = {g.name: entries(g, params) for g in groups}
    removable = []
    for kind in dict.fromkeys(g.kind for g in groups):
        of_kind = [g for g in groups if g.kind == kind]
        removable.append(
            Removable(
                kind=kind,
                groups=len(of_kind),
                units=sum(g.size for g in of_kind),
                parameters_per_unit=per_unit[of_kind[0].name],
                parameters=sum(g.size * per_unit[g.name] for g in of_kind),
                stock=all(g.config is not None for g in of_kind),
            )
        )
    counted = size(loaded.model)
    return Inspected(
        name=model,
        sha256=loaded.sha256,
        model_type=loaded.model.config.model_type,
        parameters=counted.parameters,
        parameters_without_embeddings=counted.without_embeddings,
        removable=tuple(removable),
        groups=tuple(
            {
                "group": g.name,
                "kind": g.kind,
                "units": g.size,
                "parameters_per_unit": per_unit[g.name],
                "writes": [asdict(s) for s in g.writes],
                "reads": [asdict(s) for s in g.reads],
            }
            for g in groups
        ),
        # Neurons of experts are in two groups, so not the sum of what each has.
        fixed=count(params, groups, {name: ~stay for name, stay in keep_all(groups).items()}),
        refused=refused_kinds(loaded.model),
    )


def entries(group: Group, params: Params) -> int:
    """Parameters that one unit of the group owns."""
    return sum(
        params[s.param].numel() // params[s.param].shape[s.dim] * s.block for s in group.slices
    )
