"""What a relearning audit trains: the whole model, the runs, and fresh weights of their shapes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import cost, inputs, page_runs
from .blocks import Blocks
from .compare_shapes import forward_flops
from .errors import BadInput, problems
from .inputs import Inputs
from .models import Loaded
from .progress import Track
from .recipe import Recipe
from .relearn_answers import Kind, Subject
from .relearn_cells import file_name
from .report import at, read_manifest

Found = Sequence[tuple[Path, str, dict[str, Any]]]  # folder, label and manifest of each run


def manifests(runs: Sequence[Path | str]) -> Found:
    """Folder, label and manifest of each run. Raises BadInput with all that are none."""
    folders = [Path(run) for run in runs]
    if not folders:
        raise BadInput("Give at least one run folder.")
    wrong = [f"{f} is named twice" for f in dict.fromkeys(folders) if folders.count(f) > 1]
    for folder in folders:
        if not (folder / "manifest.json").is_file() or not (folder / "model").is_dir():
            wrong.append(
                f"{folder} is not a finished run folder: it lacks manifest.json or model/. "
                "`prune`, `recover` and `compare` make them"
            )
    if wrong:
        raise BadInput(f"{wrong[0]}.") if len(wrong) == 1 else problems("the runs given", wrong)
    names = page_runs.labels(folders)
    return [
        (folder, name, read_manifest(folder / "manifest.json"))
        for folder, name in zip(folders, names, strict=True)
    ]


def origin_of(found: Found) -> dict[str, Any]:
    """The whole model of all the runs. Raises BadInput where they began with different ones."""
    origins = []
    for folder, _, told in found:
        try:
            origins.append(whole_of(told))
        except BadInput as error:
            raise BadInput(f"{folder}: {error}") from None
    if len({o["sha256"] for o in origins}) > 1:
        pairs = zip(found, origins, strict=True)
        listed = ", ".join(f"{run[0]} with {one['name']}" for run, one in pairs)
        raise BadInput(f"The runs began with different models: {listed}. Audit them apart.")
    return origins[0]


def method_of(told: Mapping[str, Any]) -> str:
    """How the model of a manifest was made, in one of the words of `compare`."""
    if isinstance(method := at(told, "compare", "method"), str):
        return method
    # A run of `recover` has a recipe of its own, and keeps what was told of the lasso before it.
    if at(told, "recipe", "prune", "method") == "lasso" or at(told, "lasso"):
        return "lasso"
    return "random" if at(told, "recipe", "score", "criterion") == "random" else "oneshot"


def whole_of(told: Mapping[str, Any]) -> dict[str, Any]:
    """Name and hash of the whole model that a run goes back to, however many runs it went through.

    Raises BadInput where the manifest does not say.
    """
    model = at(told, "made_from", "model") or at(told, "model")
    if not (isinstance(at(model, "name"), str) and isinstance(at(model, "sha256"), str)):
        raise BadInput("manifest.json does not say which model the run began with. Run it again.")
    folder = Path(model["name"])
    before = folder.parent if folder.name == "model" else folder
    if (before / "manifest.json").is_file():
        return whole_of(read_manifest(before / "manifest.json"))
    return dict(model)


def subjects_of(
    found: Found, recipe: Recipe, start: Inputs,
    held_out: Blocks, track: Track,
) -> tuple[Subject, ...]:  # fmt: skip
    """The whole model, the runs, and fresh weights of each shape that a run has.

    Raises BadInput for a run with another tokenizer, whose tokens count for something else.
    """
    taken: set[str] = set()

    def named(name: str) -> str:
        while file_name(name) in taken:
            name += "-run"
        taken.add(file_name(name))
        return name

    def subject(name: str, kind: Kind, method: str, of: str, loaded: Loaded) -> Subject:
        parameters = cost.size(loaded.model).parameters
        flops = forward_flops(loaded.model, recipe)
        shape = [(n, list(p.shape)) for n, p in loaded.model.named_parameters()]
        digest = hashlib.sha256(json.dumps(shape).encode()).hexdigest()
        return Subject(named(name), kind, method, of, loaded.sha256, digest, parameters, flops)

    every = [subject("whole", "whole", "whole", recipe.model.name, start.loaded)]
    taken |= {"scratch", *(f"scratch-{n}" for n in range(2, len(found) + 1))}
    shapes: dict[str, list[Subject]] = {}
    for folder, label, told in found:
        loaded = inputs.model_of(recipe, str(folder), track=track)
        own = inputs.blocks_of(loaded, start.domain, "held_out", recipe, track=track)
        if own.sha256 != held_out.sha256:
            raise BadInput(
                f"{folder} has another tokenizer than {recipe.model.name}: tokens of the two are "
                "not the same text, and cannot be counted against each other. Leave it out."
            )
        every.append(subject(label, "run", method_of(told), str(folder), loaded))
        shapes.setdefault(every[-1].shape, []).append(every[-1])
    for number, same in enumerate(shapes.values(), 1):
        one = same[0]
        every.append(
            Subject(
                "scratch" if number == 1 else f"scratch-{number}", "scratch", "scratch", one.model,
                None, one.shape, one.parameters, one.flops, tuple(s.name for s in same),
            )
        )  # fmt: skip
    return tuple(every)
