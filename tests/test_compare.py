"""Comparisons: fair by construction, resumable to the same rows, and answered as by hand."""

import io
import json
import math
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from commands import left_behind, refused
from llm_narrow import compare_jobs, compare_shapes, distill, inputs, outcome, recipe, train
from llm_narrow import compare_runs as comparison
from llm_narrow.claims import claimed
from llm_narrow.compare_cells import apart, shuffled_back, stream
from llm_narrow.errors import BadInput, NarrowError, TargetOutOfReach
from llm_narrow.families import find_groups
from llm_narrow.models import Loaded
from llm_narrow.plan import by_parameters
from llm_narrow.rows import Estimate, Row
from llm_narrow.scores import CRITERIA
from llm_narrow.units import remove
from tiny import CONFIGS, outputs, tiny

SETTINGS: dict[str, Any] = {
    "length": 32, "batch_size": 2, "calibration_tokens": 512, "held_out_tokens": 256,
    "validation_tokens": 128, "evaluate_every": 2, "samples": 0, "lasso_tokens": 256,
    "trackers": "tensorboard", "save_every_minutes": 1e-6,
}  # fmt: skip
ASKED: dict[str, Any] = {
    "sizes": "85%", "tokens": 768, "lrs": "1e-3,3e-3", "sweep_share": 0.5, **SETTINGS
}  # fmt: skip
METHODS = list(compare_shapes.METHODS)


@dataclass
class Seen:
    """What a comparison did: the blocks that each run was fed, and what else it looked at."""

    folder: Path
    result: comparison.Compared
    fed: dict[tuple[str, str], list[list[int]]] = field(default_factory=dict)
    held_out: list[str] = field(default_factory=list)
    validated: set[str] = field(default_factory=set)

    def run(self, method: str, seed: int = 0) -> Path:
        return self.folder / f"{method}-85-percent-seed-{seed}"

    def manifest(self, method: str, seed: int = 0) -> dict[str, Any]:
        told: dict[str, Any] = json.loads((self.run(method, seed) / "manifest.json").read_text())
        return told

    def stream(self, run: str) -> list[list[int]]:
        """The blocks of a run in the order in which they were trained on."""
        return self.fed.get((run, "lasso"), []) + self.fed[run, "recover"]


@pytest.fixture(scope="module", autouse=True)
def unproved() -> Iterator[None]:
    """Without the proof in a fresh process, which takes seconds; test_real has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_narrow.checkpoint.verify", lambda *args, **given: 0.0)
        yield


@pytest.fixture(scope="module")
def whole(
    model_folder: Path, domain_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Seen:
    """A comparison of all methods with two seeds. Do not write to it."""
    place = tmp_path_factory.mktemp("compared")
    fed: dict[tuple[str, str], list[list[int]]] = {}
    held_out: list[str] = []
    validated: set[str] = set()
    block, sums = train._Run._block, outcome.benchmark.document_sums

    def fed_with(self: Any, at: int) -> int:
        index = block(self, at)
        key = (self.rows.parent.name.removesuffix(".unfinished"), self.rows.stem)
        fed.setdefault(key, []).append(self.blocks.tokens[index].tolist())
        validated.add(self.validation.sha256)
        return index

    def measured(model: Any, blocks: Any, *rest: Any) -> Any:
        held_out.append(blocks.sha256)
        return sums(model, blocks, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_NARROW_CACHE", str(place / "cache"))
        patch.setattr(train._Run, "_block", fed_with)
        patch.setattr("llm_narrow.benchmark.document_sums", measured)
        result = comparison.compare(
            model=model_folder, domain=domain_folder, out=place / "out", **ASKED
        )
    return Seen(place / "out", result, fed, held_out, validated)


@pytest.fixture
def go(model_folder: Path, domain_folder: Path, tmp_path: Path) -> Any:
    """The same comparison, or another, into a folder of the test's own."""

    names = {"model": model_folder, "domain": domain_folder, "out": tmp_path / "out"}

    def compare(**given: Any) -> comparison.Compared:
        return comparison.compare(**{**names, **ASKED, **given})

    return partial(compare, **names)


# What makes it fair ---------------------------------------------------------------------------


def test_all_methods_train_models_of_the_same_shape(whole: Seen) -> None:
    shapes, configs, counts = set(), set(), set()
    for method in METHODS:
        held = load_file(whole.run(method) / "model/model.safetensors")
        shapes.add(str(sorted((name, tuple(t.shape)) for name, t in held.items())))
        config = json.loads((whole.run(method) / "model/config.json").read_text())
        configs.add(json.dumps(config, sort_keys=True))
        row = json.loads((whole.run(method) / "rows.jsonl").read_text().splitlines()[1])
        counts.add((row["parameters"], row["parameters_without_embeddings"], row["flops"]))
    assert len(shapes) == len(configs) == len(counts) == 1
    (shape,) = whole.result.shapes
    assert counts.pop()[:2] == (shape.parameters, shape.without_embeddings)
    total = json.loads((whole.run("scratch") / "rows.jsonl").read_text().splitlines()[0])
    assert 0.75 * total["parameters"] < shape.parameters <= 0.85 * total["parameters"]


def test_a_cached_teacher_is_asked_once_for_all_runs(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    predict = distill._predictions

    def counted(teacher: Any, blocks: Any, *rest: Any) -> Any:
        asked.append(len(blocks))
        return predict(teacher, blocks, *rest)

    monkeypatch.setattr(distill, "_predictions", counted)
    methods = "lasso,distilled,random"
    go(methods=methods, seeds=1, lrs="1e-3,2e-3", distill="cached", top_k=4)
    assert sum(asked) == 768 / 32  # the text of a run, of which a sweep sees the beginning
    for method in methods.split(","):
        told = json.loads((tmp_path / f"out/{method}-85-percent-seed-0/manifest.json").read_text())
        assert told["recover"]["distill"] == "cached"


def test_all_methods_see_the_same_blocks_in_the_same_order(whole: Seen) -> None:
    for seed in (0, 1):
        streams = [whole.stream(f"{method}-85-percent-seed-{seed}") for method in METHODS]
        assert len(streams[0]) == 24 and all(s == streams[0] for s in streams)
        assert {whole.manifest(m, seed)["compare"]["tokens"] for m in METHODS} == {768}
    assert whole.stream("scratch-85-percent-seed-0") != whole.stream("scratch-85-percent-seed-1")
    assert len(whole.fed["lasso-85-percent-seed-0", "lasso"]) == 8
    sweep = whole.stream("sweep-distilled-85-percent-lr-0.003")
    assert sweep == whole.stream("distilled-85-percent-seed-0")[:12]


def test_rates_are_chosen_on_calibration_text_and_held_out_text_is_measured_once(
    whole: Seen, model_folder: Path, domain_folder: Path
) -> None:
    assert len(whole.held_out) == 1 + 2 * len(METHODS)  # the whole model, then once for each run
    assert len({*whole.held_out}) == 1
    validated = set()
    for method in METHODS:
        told = whole.manifest(method)["compare"]
        tried = {one["lr"]: one["validation"] for one in told["sweep"]["tried"]}
        assert tried.keys() == {1e-3, 3e-3}
        assert told["lr"] == min(tried, key=lambda lr: tried[lr])
        assert whole.manifest(method, 1)["compare"]["lr"] == told["lr"]
        validated.add(told["validation"]["sha256"])
        rows = _untimed(whole.run(method) / "recover.jsonl")
        assert min(r["validation"] for r in rows if r["validation"]) == pytest.approx(
            whole.manifest(method)["recover"]["validation"]
        )
    start = inputs.gather(settled := recipe.load(None, {
        "model": model_folder, "domain": domain_folder,
        **{k: v for k, v in SETTINGS.items()},
    }))  # fmt: skip
    packed = inputs.blocks_of(start.loaded, start.domain, "calibration", settled)
    free, validation = apart(packed, 128)
    assert validated == whole.validated == {validation.sha256} and len(validation.tokens) == 4
    assert not {*free.documents.unique().tolist()} & {*validation.documents.unique().tolist()}
    assert {tuple(b) for b in free.tokens.tolist()} | {
        tuple(b) for b in validation.tokens.tolist()
    } <= {tuple(b) for b in packed.tokens.tolist()}


def test_random_units_are_exact_in_number_and_drawn_without_replacement(whole: Seen) -> None:
    kept = {
        (m, s): load_file(whole.run(m, s) / "model/keep.safetensors")
        for m in ("oneshot", "random")
        for s in (0, 1)
    }
    for name, units in kept["oneshot", 0].items():
        for keep in kept.values():
            assert int(keep[name].sum()) == int(units.sum())
    mlp = next(name for name in kept["random", 0] if "mlp" in name)
    assert not kept["random", 0][mlp].equal(kept["random", 1][mlp])
    assert not kept["random", 0][mlp].equal(kept["oneshot", 0][mlp])


def test_fresh_weights_are_those_of_the_architecture_by_seed(whole: Seen) -> None:
    (shape,) = whole.result.shapes
    one, same, other = (compare_shapes.fresh(shape, seed).state_dict() for seed in (0, 0, 1))
    name = "model.layers.0.mlp.up_proj.weight"
    assert one[name].equal(same[name]) and not one[name].equal(other[name])
    assert float(one[name].std()) == pytest.approx(shape.config.initializer_range, rel=0.15)
    card = (whole.run("scratch") / "model/README.md").read_text()
    assert "fresh weights" in card and "made smaller" not in card
    assert "fresh weights" in (whole.run("distilled") / "report.md").read_text()
    assert "fresh weights" not in (whole.run("oneshot") / "report.md").read_text()


def test_methods_learn_from_what_they_are_to(whole: Seen) -> None:
    learnt = {m: whole.manifest(m)["recover"]["distill"] for m in METHODS}
    assert learnt == {**dict.fromkeys(METHODS, "teacher"), "scratch": "none"}
    assert whole.manifest("random")["scores"]["criterion"] == "random"
    lasso = whole.manifest("lasso")
    assert lasso["lasso"]["tokens"] == 256 == lasso["compare"]["lasso_tokens"]
    assert lasso["recover"]["tokens"] == 512
    assert lasso["recipe"]["lasso"]["lr"] == lasso["compare"]["lr"]


def test_blocks_come_again_where_the_text_ends(whole: Seen, domain_folder: Path) -> None:
    start = inputs.gather(settled := recipe.load(None, {
        "model": whole.manifest("scratch")["model"]["name"], "domain": domain_folder, **SETTINGS,
    }))  # fmt: skip
    packed = inputs.blocks_of(start.loaded, start.domain, "calibration", settled)
    count = len(packed.tokens)
    long = stream(packed, (2 * count + 3) * 32, 5)
    assert len(long.tokens) == 2 * count + 3
    assert stream(packed, 10 * 32, 5).tokens.equal(long.tokens[:10])
    first, second = (sorted(long.tokens[a : a + count].tolist()) for a in (0, count))
    assert first == second == sorted(packed.tokens.tolist())
    placed = shuffled_back(long, 5)
    taken = [placed.tokens[n] for n in train.order_of_blocks(len(placed.tokens), 5, 0)]
    assert torch.stack(taken).equal(long.tokens)


@pytest.mark.parametrize("kind", sorted(CONFIGS.keys() - {"bloom", "mpt"}))  # of fixed width
def test_every_family_has_fresh_models_of_its_narrowed_shape(kind: str) -> None:
    model = tiny(kind)
    groups = tuple(find_groups(model))
    loaded = Loaded(model, None, kind, Path(), "")
    start = inputs.Inputs(loaded, groups, groups, None, torch.device("cpu"), False)  # type: ignore[arg-type]
    settled = recipe.load(None, {"model": kind, "domain": "d", "kinds": "neurons"})
    (shape,) = compare_shapes.shapes_of(settled, start, ["90%"]).values()
    fresh = compare_shapes.fresh(shape, 0)
    plan = by_parameters(
        model, groups, {g.name: torch.rand(g.size) for g in groups}, kinds=("neurons",),
        target=round(0.9 * sum(p.numel() for p in model.parameters())),
    )  # fmt: skip
    remove(model, groups, plan.keep)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in fresh.named_parameters()
    }
    assert shape.parameters == plan.parameters_after < plan.parameters_before
    assert torch.isfinite(outputs(fresh, kind)).all()


def test_a_shape_that_llama_refuses_is_one_of_another_stock_class() -> None:
    model = tiny("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    groups = tuple(find_groups(model))
    start = inputs.Inputs(
        Loaded(model, None, "m", Path(), ""), groups, groups, None, torch.device("cpu"), False  # type: ignore[arg-type]
    )
    settled = recipe.load(None, {"model": "m", "domain": "d", "kinds": "heads"})
    (shape,) = compare_shapes.shapes_of(settled, start, ["90%"]).values()
    assert (shape.config.num_attention_heads, shape.config.num_key_value_heads) == (6, 3)
    assert shape.config.model_type != "llama"
    fresh = compare_shapes.fresh(shape, 0)
    keep = {g.name: torch.arange(g.size) < (3 if g.kind == "heads" else g.size) for g in groups}
    remove(model, groups, keep)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in fresh.named_parameters()
    }


# Stopping, going on ---------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["sweep", "lasso", "recover", "save"])
def test_a_stopped_comparison_goes_on_to_the_same_rows(
    at: str, whole: Seen, go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"methods": "scratch,lasso", "seeds": 1}
    # Steps: scratch 6 + 6 to choose, 12 in full; lasso 2 + 4, twice, then 4 + 8.
    steps = {"sweep": 9, "lasso": 24 + 12 + 2, "recover": 24 + 12 + 4 + 5}
    advance, taken = train._Run._advance, [0]

    def step(self: Any) -> Any:
        taken[0] += 1
        if taken[0] == steps.get(at, math.inf):
            raise KeyboardInterrupt
        return advance(self)

    def stop(*args: object, **given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(train._Run, "_advance", step)
        if at == "save":
            stopped.setattr("llm_narrow.checkpoint.save", stop)
        with pytest.raises(KeyboardInterrupt) as caught:
            go(**given)
    assert caught.value.__notes__ == ["What is done is kept; go on with the same command."]
    trained = taken[0]
    monkeypatch.setattr(train._Run, "_advance", step)
    done = go(**given)
    names = [f"{method}-85-percent-seed-0" for method in ("lasso", "scratch")]
    assert left_behind(tmp_path / "out") == ["compare.json", "compare.md", *names, "work"]
    # The step in the middle of which it was stopped is the only one taken twice.
    assert taken[0] == 48 + (at != "save"), trained
    for name in names:
        for stage in ("lasso", "recover"):
            ours, theirs = (folder / name / f"{stage}.jsonl"
                            for folder in (tmp_path / "out", whole.folder))  # fmt: skip
            assert ours.exists() == theirs.exists()
            assert not ours.exists() or _untimed(ours) == _untimed(theirs)
        held = [load_file(folder / name / "model/model.safetensors")
                for folder in (tmp_path / "out", whole.folder)]  # fmt: skip
        assert all(held[0][key].equal(held[1][key]) for key in held[0])
    assert done.answers is not None and len(done.answers.lines) == 2
    assert not list((tmp_path / "out/work").glob("*.unfinished"))
    assert not list((tmp_path / "out/work").glob("begin-*"))


def _untimed(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def test_finished_runs_are_not_repeated_and_other_settings_are_refused(
    whole: Seen, model_folder: Path, domain_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "copy"
    shutil.copytree(whole.folder, out)
    monkeypatch.setattr("llm_narrow.train.train", None)
    monkeypatch.setattr("llm_narrow.training.train", None)
    monkeypatch.setattr("llm_narrow.benchmark.document_sums", None)
    names = {"model": model_folder, "domain": domain_folder, "out": out}
    again = comparison.compare(**{**names, **ASKED})
    assert again.answers == whole.result.answers
    forecast = comparison.compare(**{**names, **ASKED, "dry_run": True}).forecast
    assert forecast is not None
    assert (forecast.runs, forecast.runs_done, forecast.sweeps, forecast.sweeps_done) == (
        10, 10, 10, 10
    )  # fmt: skip
    assert forecast.seconds == 0 and forecast.timed == "finished runs"
    with pytest.raises(BadInput) as caught:
        comparison.compare(**{**names, **ASKED, "seeds": 3, "lrs": [1e-3], "mix": 0.5})
    told = str(caught.value)
    assert "compare.seeds was 2 and is 3 now" in told
    assert "compare.lrs was [0.001, 0.003] and is [0.001] now" in told
    assert "train.mix was 0.3 and is 0.5 now" in told


def test_weights_of_the_sweep_are_not_kept(whole: Seen) -> None:
    sizes = [f.stat().st_size for f in (whole.folder / "work").rglob("*") if f.is_file()]
    model = (whole.run("scratch") / "model/model.safetensors").stat().st_size
    assert sum(sizes) < model / 2


def test_all_rates_of_a_method_begin_with_one_refit(
    go: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_narrow import removal

    refit, calls = removal.refit_and_remove, [0]

    def counted(*args: Any, **given: Any) -> Any:
        calls[0] += 1
        return refit(*args, **given)

    monkeypatch.setattr(removal, "refit_and_remove", counted)
    go(methods="oneshot", seeds=2, tokens=256)
    assert calls == [2]  # one for each seed, none for each rate


def test_a_rate_at_which_the_loss_is_not_finite_is_not_chosen(go: Any, tmp_path: Path) -> None:
    go(methods="scratch", seeds=1, tokens=512, lrs="1e30,1e-3")
    manifest = json.loads((tmp_path / "out/scratch-85-percent-seed-0/manifest.json").read_text())
    wild, tame = manifest["compare"]["sweep"]["tried"]
    assert (wild["lr"], wild["validation"]) == (1e30, None) and "finite" in wild["error"]
    assert manifest["compare"]["lr"] == tame["lr"] == 1e-3


# Before anything runs -------------------------------------------------------------------------


def test_sizes_out_of_reach_are_refused_before_anything_runs(go: Any, tmp_path: Path) -> None:
    with pytest.raises(TargetOutOfReach) as caught:
        go(sizes="85%,20%,10%")
    told = str(caught.value)
    assert "--sizes 20%:" in told and "--sizes 10%:" in told and "85%" not in told
    assert "removing neurons and heads can reach" in told
    with pytest.raises(TargetOutOfReach, match="removing neurons can reach"):
        go(sizes="65%", kinds="neurons")
    assert left_behind(tmp_path) == []


def test_heads_go_only_where_neurons_do_not_suffice(
    go: Any, model_folder: Path, domain_folder: Path, tmp_path: Path
) -> None:
    # By keywords, and by a recipe as the command line has it.
    settled = recipe.load(
        None, {"model": model_folder, "domain": domain_folder, **SETTINGS, "recover_tokens": 768}
    )
    asked = {"sizes": "85%,62%", "tokens": 768, "out": tmp_path / "out", "dry_run": True}
    for found in (go(sizes="85%,62%", dry_run=True), comparison.compare(settled, **asked)):
        assert [(s.size, s.kinds) for s in found.shapes] == [
            ("85%", ("neurons",)), ("62%", ("neurons", "heads"))
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sizes": "85%,84.99%"}, "come to the same"),
        ({"sizes": "half"}, "--sizes are shares"),
        ({"sizes": "100%"}, "--sizes are shares"),
        ({"sizes": ""}, "--sizes must be at least one"),
        ({"methods": "onshot"}, "Did you mean 'oneshot'"),
        ({"lrs": "fast"}, "--lrs must be numbers above 0, got 'fast'"),
        ({"lrs": [1e-3, 1e-3]}, "none of them twice"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"sweep_share": 0.0}, "--sweep-share must be above 0"),
        ({"lasso_tokens": 768}, "leave none for the recovery"),
        ({"allocation": "global"}, "allocation must be uniform"),
        ({"recover_method": "lora"}, r"recover\.method must be full"),
        ({"fill": False}, r"lasso\.fill must be true"),
        ({"tokens": "many"}, "recover_tokens must be"),
        ({"validation_tokens": 10**6}, "nothing of it is left to score"),
        ({"calibration_tokens": 10**6}, "tokens were asked for"),
    ],
)
def test_what_cannot_be_compared_is_told(
    given: dict[str, Any], words: str, go: Any, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match=words) as caught:
        go(**given)
    assert isinstance(caught.value, BadInput) or "UnknownName" in type(caught.value).__name__
    assert left_behind(tmp_path) == []


def test_a_folder_of_something_else_is_not_written_to(go: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="is no comparison"):
        go()
    assert left_behind(tmp_path / "out") == ["notes.txt"]


def test_a_dry_run_tells_runs_tokens_and_time(
    run: Any, model_folder: Path, domain_folder: Path, tmp_path: Path
) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    line = ["compare", "--model", model_folder, "--domain", domain_folder, "--sizes", "85%",
            "--tokens", "640", "--seeds", "3", "--lrs", "1e-3,3e-3", "--sweep-share", "0.5",
            "--out", tmp_path / "out", "--dry-run", *flags]  # fmt: skip
    done = run(*line, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    forecast = told["forecast"]
    # 5 methods: 3 seeds of 640 tokens and 2 rates on 320.
    assert (forecast["runs"], forecast["sweeps"], forecast["tokens"]) == (15, 10, 15 * 640 + 3200)
    assert forecast["timed"] == "a timed step" and forecast["seconds"] > 0
    assert forecast["bytes"] == 15 * 4 * told["sizes"][0]["parameters"]
    # No less than three forward passes of what learns; the teachers come on top.
    assert forecast["flops"] > 3 * told["sizes"][0]["flops"] * forecast["tokens"]
    shown = run(*line)
    assert "15 in full, 10 to choose learning rates" in shown.out and "left" in shown.out
    assert left_behind(tmp_path) == []
    lacking = run("compare", "--model", "m", "--domain", "d", "--sizes", "85%")
    assert lacking.code == 2 and "are needed, or --from" in lacking.err


def test_the_flops_of_a_run_are_those_of_its_passes(whole: Seen) -> None:
    (shape,) = whole.result.shapes
    told = {m: whole.manifest(m)["compare"] for m in METHODS}
    scratch, distilled, lasso = (told[m]["flops"] for m in ("scratch", "distilled", "lasso"))
    assert scratch == {"score": 0, "refit": 0, "lasso": 0, "recover": 3 * shape.flops,
                       "training": 768 * 3 * shape.flops}  # fmt: skip
    teacher = distilled["recover"] - scratch["recover"]
    assert teacher > shape.flops  # the whole model
    assert lasso["lasso"] == 4 * teacher
    assert lasso["training"] == 256 * lasso["lasso"] + 512 * lasso["recover"]
    assert told["oneshot"]["flops"]["score"] == 512 * 2 * teacher
    assert told["random"]["flops"]["score"] == 0
    for method in ("oneshot", "random", "lasso"):
        assert told[method]["flops"]["refit"] == 512 * 2 * (teacher + shape.flops)
    assert told["lasso"]["flops_per_token"] == lasso["training"] / 768


# Answers --------------------------------------------------------------------------------------


def test_a_comparison_answers_what_its_rows_say(whole: Seen) -> None:
    answers = whole.result.answers
    assert answers is not None and answers.warnings == () and answers.metric == "loss"
    assert json.loads((whole.folder / "compare.json").read_text())["lines"]
    assert [line.method for line in answers.lines] == METHODS
    for line in answers.lines:
        rows = [
            json.loads((whole.run(line.method, seed) / "rows.jsonl").read_text().splitlines()[1])
            for seed in (0, 1)
        ]
        losses = [row["loss"] for row in rows]
        assert line.loss == Estimate(sum(losses) / 2, min(losses), max(losses))
        assert line.seeds == (0, 1)
        begun = 256 if line.method == "lasso" else 0
        assert [p.tokens for p in line.curve] == [
            t for t in range(0, 769, 128) if t >= begun
        ]  # fmt: skip
        assert line.curve[-1].flops == line.flops
        assert all(p.low <= p.mean <= p.high for p in line.curve)
    lasso = next(line for line in answers.lines if line.method == "lasso")
    rows, other = (_untimed(whole.run("lasso", seed) / "recover.jsonl") for seed in (0, 1))
    assert lasso.curve[0].mean == pytest.approx(
        (rows[0]["validation"] + other[0]["validation"]) / 2
    )
    told = whole.manifest("lasso")["compare"]["validation"]
    assert lasso.curve[0].bits_per_byte == pytest.approx(
        lasso.curve[0].mean * told["targets"] / told["bytes"] / math.log(2)
    )


def hand_made(
    folder: Path, method: str, points: dict[int, float], *, loss: float = 2.0, seed: int = 0,
    parameters: int = 1000, size: str = "50%", domain: str = "text", bare: bool = False,
    **compare: Any,
) -> Path:  # fmt: skip
    """A run folder with a curve of our own; steps are of 100 tokens."""
    folder.mkdir(parents=True)
    row = Row(
        "after", "m", "s", domain, "held_out", 1000, 10, Estimate(loss, loss - 0.1, loss + 0.1),
        Estimate(loss / 2, 0.1, 9.0), Estimate(0.5, 0.4, 0.6), parameters, parameters // 2,
    ).to_dict()  # fmt: skip
    if bare:
        row["bits_per_byte"] = None
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    lines = [{"step": t // 100, "tokens": t, "loss": v, "validation": v} for t, v in points.items()]
    (folder / "recover.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = {
        "method": method, "size": size, "seed": seed, "lr": 1e-3, "tokens": max(points),
        "calibration_tokens": 0, "flops": {"score": 0, "refit": 0, "lasso": 0, "recover": 2},
        **compare,
    }  # fmt: skip
    (folder / "manifest.json").write_text(
        json.dumps({"compare": told, "domain": {"sha256": {"held_out": domain}}})
    )
    return folder


def test_tokens_to_a_loss_are_those_by_hand(tmp_path: Path) -> None:
    narrow = {0: 3.0, 100: 2.5, 400: 2.3, 1600: 2.1}
    runs = [
        hand_made(tmp_path / "a", "oneshot", narrow, calibration_tokens=800,
                  flops={"score": 2000, "refit": 3000, "lasso": 0, "recover": 4}),
        hand_made(tmp_path / "b", "scratch", {0: 9.0, 100: 6.0, 400: 4.0, 1600: 2.4}, loss=3.0),
    ]  # fmt: skip
    answers = comparison.recompute(runs, targets=[2.4, 2.0, 2.75]).answers
    assert answers is not None
    found = {(t.method, t.target): t for t in answers.tokens}
    # Half-way between 2.5 and 2.3, so at the geometric mean of 100 and 400.
    assert found["oneshot", 2.4].tokens == pytest.approx(200)
    assert found["oneshot", 2.4].flops == pytest.approx(2000 + 3000 + 4 * 200)
    assert found["scratch", 2.4].tokens == pytest.approx(1600)
    # Half of the first step's way, but no model is trained by half a step.
    assert found["oneshot", 2.75].tokens == 100
    assert found["oneshot", 2.0].tokens is None and found["scratch", 2.0].tokens is None
    (gain,) = answers.advantages
    assert (gain.method, gain.other, gain.how) == ("oneshot", "scratch", "trained")
    assert gain.ratio == pytest.approx(1600 / 200)
    assert gain.ratio_with_calibration == pytest.approx(1600 / (200 + 800))
    assert gain.flops_ratio == pytest.approx(2 * 1600 / 5800)


def test_never_and_untrained_are_shown_as_such(tmp_path: Path, run: Any) -> None:
    for seed, end in ((0, 2.0), (1, 2.2)):
        hand_made(tmp_path / f"runs/a{seed}", "oneshot", {0: 2.5, 100: end}, seed=seed)
        hand_made(tmp_path / f"runs/b{seed}", "distilled", {0: 5.0, 100: 1.9}, seed=seed)
        hand_made(tmp_path / f"runs/c{seed}", "scratch", {0: 5.0, 100: 3.0}, seed=seed, loss=4.0)
    done = run("compare", "--from", tmp_path / "runs", "--out", tmp_path / "answers",
               "--target", "2.15", "--target", "1.0")  # fmt: skip
    assert done.code == 0, done.err
    assert "never" in done.out and "untrained" in done.out
    told = json.loads((tmp_path / "answers/compare.json").read_text())
    gains = {x["other"]: x for x in told["advantages"]}
    assert (gains["distilled"]["how"], gains["distilled"]["ratio"]) == ("never", 0.0)
    assert (gains["scratch"]["how"], gains["scratch"]["ratio"]) == ("untrained", None)
    tokens = {(t["method"], t["target"]): t for t in told["tokens"]}
    # One of two seeds gets there, and so does their mean.
    assert tokens["oneshot", 2.15]["tokens"] == 100
    assert (tokens["oneshot", 2.15]["low"], tokens["oneshot", 2.15]["high"]) == (100, None)
    assert tokens["oneshot", 1.0]["tokens"] is None
    page = (tmp_path / "answers/compare.md").read_text()
    assert "never within 100" in page and "| untrained |" in page
    assert "Infinity" not in json.dumps(told) and "NaN" not in json.dumps(told)


def test_the_size_needed_is_that_by_hand(tmp_path: Path) -> None:
    runs = [
        hand_made(tmp_path / f"{method}{parameters}", method, {0: 5.0, 100: loss}, loss=loss,
                  parameters=parameters, size=str(parameters))
        for method, by_size in {"oneshot": {1000: 3.0, 4000: 2.0}, "scratch": {1000: 4.0}}.items()
        for parameters, loss in by_size.items()
    ]  # fmt: skip
    answers = comparison.recompute(runs, targets=[2.5, 3.5, 1.0]).answers
    assert answers is not None
    found = {(s.method, s.target): (s.parameters, s.at_most) for s in answers.sizes}
    assert found["oneshot", 2.5] == (pytest.approx(2000), False)
    assert found["oneshot", 3.5] == (1000, True)
    assert found["oneshot", 1.0] == found["scratch", 3.5] == (None, False)


def test_missing_and_half_written_runs_are_named(
    whole: Seen, tmp_path: Path, run: Any
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(whole.folder, out)
    (out / "random-85-percent-seed-1").rename(out / "random-85-percent-seed-1.unfinished")
    (out / "oneshot-85-percent-seed-0/manifest.json").unlink()
    done = run("compare", "--from", out, "--json")
    assert done.code == 0, done.err
    warnings = json.loads(done.out)["answers"]["warnings"]
    assert len(warnings) == 2
    assert "oneshot-85-percent-seed-0" in warnings[0] and "not finished" in warnings[0]
    assert "random-85-percent-seed-1 is not finished: there is only" in warnings[1]
    strict = run("compare", "--from", out, "--strict")
    assert strict.code == 2 and strict.out == ""
    assert "2 problems" in strict.err and "random-85-percent-seed-1" in strict.err
    refused(run("compare", "--from", tmp_path / "none"), "no such folder")


def test_other_domains_need_bits_per_byte(tmp_path: Path) -> None:
    curve = {0: 3.0, 100: 2.0}
    a = hand_made(tmp_path / "a", "oneshot", curve)
    b = hand_made(tmp_path / "b", "scratch", curve, domain="other", bare=True)
    with pytest.raises(BadInput, match=r"domains differ.*lack bits per byte"):
        comparison.recompute([a, b])
    c = hand_made(tmp_path / "c", "scratch", curve, domain="other")
    answers = comparison.recompute([a, c]).answers
    assert answers is not None and answers.metric == "bits_per_byte"
    assert answers.tokens == answers.advantages == ()
    assert any("bits per byte" in w for w in answers.warnings)


def test_losses_on_other_validation_blocks_are_not_compared(tmp_path: Path) -> None:
    curve = {0: 3.0, 100: 2.0}
    runs = [
        hand_made(tmp_path / name, method, curve, validation={"sha256": name})
        for name, method in (("a", "oneshot"), ("b", "scratch"))
    ]
    answers = comparison.recompute(runs).answers
    assert answers is not None and answers.advantages == ()
    assert any("different blocks" in w for w in answers.warnings)


def test_the_recipe_of_the_paper_has_its_budgets() -> None:
    root = Path(__file__).parent.parent / "recipes"
    paper = recipe.load(root / "paper.yaml")
    per_step = compare_shapes.tokens_per_step(paper)
    assert per_step == 64 * 1024
    assert paper.recover.tokens == 20_000 * per_step
    assert paper.train.warmup * paper.recover.tokens / per_step == 1000
    assert paper.lasso.tokens == 70_000 * 108 * 512
    recipe.load(root / "paper.yaml", {"method": "lasso"})
    recipe.load(root / "compare-from-scratch.yaml", {"recover_tokens": "20M"})


DOCUMENTS = ("docs/compare.md", "recipes/paper.yaml", "recipes/compare-from-scratch.yaml")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_commands_of_the_documents_can_be_asked_for(
    document: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parent.parent
    lines = [line.lstrip("# ") for line in (root / document).read_text().splitlines()]
    lines = [line for line in lines if line.startswith("llm-narrow compare ")]
    assert lines
    caught: list[dict[str, Any]] = []

    def stop(first: Any, **given: Any) -> None:
        caught.append({"first": first, **given})
        raise BadInput("far enough")

    monkeypatch.setattr(comparison, "compare", stop)
    monkeypatch.setattr(comparison, "recompute", stop)
    for line in lines:
        words = shlex.split(line)[1:]
        run(*(root / word if word.startswith("recipes/") else word for word in words))
        told = caught.pop()
        if "--from" in words:
            assert told["targets"] == [2.4] and len(told["first"]) == 2
            continue
        settled = told["first"]
        names = ("sizes", "methods", "lrs", "seeds", "sweep_share")
        asked = compare_shapes.Asked.of(
            tokens=settled.recover.tokens, **{name: told[name] for name in names}
        )
        for size, method in product(asked.sizes, asked.methods):
            shape = compare_shapes.Shape(size, ("neurons",), None, 1, 1, 1.0)
            one = compare_shapes.recipe_of(settled, asked, shape, method, seed=0, lr=1e-3)
            per_step = compare_shapes.tokens_per_step(settled)
            total = sum(compare_shapes.trained_tokens(one))
            assert asked.tokens <= total < asked.tokens + per_step


# Several processes ----------------------------------------------------------------------------


def test_what_another_process_is_at_is_left_to_it(go: Any, tmp_path: Path) -> None:
    whole_run = {"methods": "scratch,distilled", "seeds": 1, "lrs": "1e-3"}
    go(**whole_run)
    shutil.rmtree(tmp_path / "out/scratch-85-percent-seed-0")
    shutil.rmtree(tmp_path / "out/distilled-85-percent-seed-0")
    work, text = tmp_path / "out/work", io.StringIO()
    settings = json.loads((work / "settings.json").read_text())
    asked = compare_shapes.Asked(**settings["compare"])
    given = {"model": str(go.keywords["model"]), "domain": str(go.keywords["domain"])}
    settled = recipe.load(None, {**given, **SETTINGS, "recover_tokens": 768}, criteria=CRITERIA)
    with claimed(work, "scratch-85-percent-seed-0"):
        # A claim is a process's own; within one, another lock object stands for the other.
        comparison.join(settled, asked, tmp_path / "out", "…", Console(file=text))
    assert not (tmp_path / "out/scratch-85-percent-seed-0").exists()
    assert (tmp_path / "out/distilled-85-percent-seed-0/manifest.json").exists()
    comparison.join(settled, asked, tmp_path / "out", "…", Console(file=text))
    assert (tmp_path / "out/scratch-85-percent-seed-0/manifest.json").exists()


@pytest.mark.long
def test_processes_share_the_runs_of_a_comparison(
    whole: Seen, go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = io.StringIO()
    done = go(methods="scratch,distilled,random", seeds=1, jobs=2, console=Console(file=text))
    assert done.answers is not None and len(done.answers.lines) == 3
    logs = [file.read_text() for file in sorted((tmp_path / "out/work/jobs").glob("job-*.log"))]
    assert len(logs) == 2
    for method in ("scratch", "distilled", "random"):
        told = f"{method} at 85%, seed 0, learning rate"
        assert sum(log.count(told) for log in logs) == 1  # by one of them, and once
        assert f"{method} at 85%, seed 0: done" in text.getvalue()
        ours, theirs = (
            json.loads((folder / f"{method}-85-percent-seed-0/manifest.json").read_text())
            for folder in (tmp_path / "out", whole.folder)
        )
        assert ours["recover"]["validation"] == pytest.approx(theirs["recover"]["validation"])


@pytest.mark.long
def test_a_process_that_fails_ends_the_others(go: Any, tmp_path: Path) -> None:
    go(methods="scratch", seeds=1, lrs="1e-3")
    (tmp_path / "out/scratch-85-percent-seed-0/manifest.json").unlink()
    with pytest.raises(NarrowError, match=r"Process \d failed: .*exists already") as caught:
        go(methods="scratch", seeds=1, lrs="1e-3", jobs=2)
    assert "go on with the same command" in str(caught.value.__notes__)


def test_the_machine_is_shared_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [compare_jobs.share(cpu, n, 2) for n in (0, 1)] == [{"OMP_NUM_THREADS": "2"}] * 2
    assert compare_jobs.share(cpu, 3, 8) == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    shared = [compare_jobs.share(gpu, n, 3)["CUDA_VISIBLE_DEVICES"] for n in range(3)]
    assert shared == ["4", "6", "4"]
    assert compare_jobs.share(torch.device("cuda:1"), 0, 2) == {}
