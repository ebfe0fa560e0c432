"""Relearning audits: right by hand, fair, blind to held-out text, resumable to the same rows."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import refused
from folders import write_domain, write_model
from llm_narrow import inputs, relearn_cells, train
from llm_narrow.errors import BadInput, NarrowError
from llm_narrow.models import load
from llm_narrow.relearn import relearn
from llm_narrow.relearn_answers import Subject, answers, line_of, ratio_of
from llm_narrow.relearn_cells import places
from llm_narrow.relearn_subjects import method_of, whole_of
from llm_narrow.relearn_text import answer_text
from proof import ASKED, write_lost, write_runs


@pytest.fixture(scope="module", autouse=True)
def unproved() -> Iterator[None]:
    """Without the proof in a fresh process, which takes seconds; test_real has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_narrow.checkpoint.verify", lambda *args, **given: 0.0)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, their lost domain, and an audit of them. Do not write to it."""
    folder = tmp_path_factory.mktemp("proof")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_NARROW_CACHE", str(folder / "cache"))
        write_runs(folder, "score", "random", "uneven", "fresh")
        write_lost(folder / "lost")
        relearn([folder / name for name in ("score", "random")], domain=str(folder / "lost"),
                out=folder / "audit", **ASKED)  # fmt: skip
    return folder


@pytest.fixture
def go(place: Path, tmp_path: Path) -> Any:
    """The same audit, or another, into a folder of the test's own."""

    def call(*names: str, **given: Any) -> Any:
        asked = {"domain": str(place / "lost"), "out": tmp_path / "audit", **ASKED, **given}
        return relearn([place / name for name in names or ("score", "random")], **asked)

    return call


def told(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "relearn.json").read_text())
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


# The ratio, by hand ---------------------------------------------------------------------------


def subject(name: str, kind: Any, like: tuple[str, ...] = ()) -> Subject:
    return Subject(name, kind, kind, name, None, "shape", 1, 1.0, like)


def curve(name: str, seed: int, *points: tuple[int, float]) -> list[dict[str, Any]]:
    return [
        {"subject": name, "seed": seed, "trained": tokens} | {
            key: value
            for what in ("loss", "bits_per_byte", "accuracy")
            for key, value in ((what, loss), (f"{what}_low", loss - 1), (f"{what}_high", loss + 1))
        }
        for tokens, loss in points
    ]  # fmt: skip


def answered(found: list[dict[str, Any]], target: Any = None, margin: float = 0.0) -> Any:
    every = [subject("whole", "whole"), subject("run", "run"),
             subject("scratch", "scratch", ("run",))]  # fmt: skip
    lines = [line_of(s, found, 1e-3, []) for s in every]
    return answers(lines, found, target=target, margin=margin)


WHOLE = curve("whole", 0, (0, 2.0), (100, 1.5), (400, 1.2))
SCRATCH = curve("scratch", 0, (0, 6.0), (100, 4.0), (400, 2.0))


def test_the_ratio_is_that_of_the_tokens() -> None:
    found = answered([*WHOLE, *SCRATCH, *curve("run", 0, (0, 5.0), (100, 2.0), (400, 1.9))])
    one = found.of("run")
    assert one is not None
    assert (one.goal, one.target, one.tokens) == ("whole", 2.0, 100.0)
    assert one.scratch_tokens == pytest.approx(400.0)
    assert one.ratio == pytest.approx(0.25)
    assert one.ratio == one.low == one.high == one.at_least == one.at_most
    assert answer_text(one) == "0.25"
    # Half-way in loss is half-way in the logarithm of the tokens: 100 x 4 ** 0.5.
    half = answered([*WHOLE, *SCRATCH, *curve("run", 0, (0, 5.0), (100, 2.0), (400, 1.9))], 3.0)
    assert half.of("run").scratch_tokens == pytest.approx(200.0)
    assert half.of("run").goal == "given"


def test_a_run_that_learns_as_fresh_weights_do_is_at_1() -> None:
    same = curve("run", 0, (0, 6.0), (100, 4.0), (400, 2.0))
    for target in ("whole", "scratch", 3.3):
        assert answered([*WHOLE, *SCRATCH, *same], target).of("run").ratio == pytest.approx(1.0)


def test_what_was_never_lost_is_at_0() -> None:
    kept = curve("run", 0, (0, 2.05), (100, 1.8), (400, 1.7))
    one = answered([*WHOLE, *SCRATCH, *kept], margin=0.1).of("run")
    assert (one.ratio, answer_text(one)) == (0.0, "0")
    never = curve("scratch", 0, (0, 6.0), (100, 5.0), (400, 4.0))
    assert answered([*WHOLE, *never, *kept], margin=0.1).of("run").ratio == 0.0


def test_never_within_the_budget_is_a_bound() -> None:
    slow = curve("scratch", 0, (0, 6.0), (100, 5.0), (400, 4.0))
    quick = curve("run", 0, (0, 5.0), (100, 2.0), (400, 1.9))
    below = answered([*WHOLE, *slow, *quick]).of("run")
    assert (below.ratio, below.at_least, below.at_most) == (None, None, 0.25)
    assert answer_text(below) == "below 0.25"
    gone = curve("run", 0, (0, 9.0), (100, 8.0), (400, 7.0))
    fast = curve("scratch", 0, (0, 6.0), (100, 2.0), (400, 1.8))
    above = answered([*WHOLE, *fast, *gone]).of("run")
    assert (above.ratio, above.at_least, above.at_most) == (None, 4.0, None)
    assert answer_text(above) == "above 4"
    neither = answered([*WHOLE, *slow, *gone]).of("run")
    assert (neither.at_least, neither.at_most, answer_text(neither)) == (None, None, "unknown")
    json.dumps(answered([*WHOLE, *slow, *gone]).to_dict(), allow_nan=False)


def test_seeds_give_the_range_and_an_open_end() -> None:
    scratch = [*SCRATCH, *curve("scratch", 1, (0, 6.0), (100, 4.0), (400, 2.0))]
    quick = curve("run", 0, (0, 5.0), (100, 2.0), (400, 1.9))
    slow = curve("run", 1, (0, 5.0), (100, 4.0), (400, 2.0))
    whole = [*WHOLE, *curve("whole", 1, (0, 2.0), (100, 1.5), (400, 1.2))]
    one = answered([*whole, *scratch, *quick, *slow]).of("run")
    assert (one.low, one.high) == (pytest.approx(0.25), pytest.approx(1.0))
    assert 0.25 < one.ratio < 1.0
    never = curve("run", 1, (0, 5.0), (100, 4.5), (400, 2.05))
    one = answered([*whole, *scratch, *quick, *never], 2.04).of("run")
    assert one.low == pytest.approx(0.25, abs=0.02)
    assert one.high is None
    assert answer_text(one).endswith("open]")


def test_bounds_by_definition() -> None:
    assert ratio_of(0, 0, 400) == (None, None, None)
    assert ratio_of(50, 0, 400) == (None, None, None)
    assert ratio_of(math.inf, 0, 400) == (None, None, None)
    assert ratio_of(math.inf, math.inf, 400) == (None, None, None)


# A real one -----------------------------------------------------------------------------------


def test_what_is_trained_and_written(place: Path) -> None:
    found, lines = told(place / "audit"), rows(place / "audit")
    names = [(x["subject"]["name"], x["subject"]["method"]) for x in found["lines"]]
    assert names == [("whole", "whole"), ("score", "oneshot"), ("random", "random"),
                     ("scratch", "scratch")]  # fmt: skip
    assert found["lines"][3]["subject"]["like"] == ["score", "random"]
    steps = places(6, ASKED["points"])
    assert [r["trained"] for r in lines[: len(steps) + 1]] == [0, *(128 * n for n in steps)]
    assert len(lines) == 4 * 2 * (len(steps) + 1)
    assert {r["part"] for r in lines} == {"held_out"}
    assert lines[0]["bits_per_byte_ratio"] == 1.0  # the whole model against itself
    for line in found["lines"]:
        assert line["lr"] in (1e-3, 3e-3)
        assert len(line["tried"]) == 2
        assert line["curve"][-1]["loss"]["value"] < line["curve"][0]["loss"]["value"]
    text = (place / "audit/relearn.md").read_text()
    assert "relearn.svg" in text
    assert (place / "audit/relearn.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((place / "audit/curves").iterdir())) == 8
    assert {f.name for f in (place / "audit/work").glob("*.unfinished")} == set()


def test_all_learn_the_same_blocks_in_the_same_order(
    go: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: dict[str, list[list[int]]] = {}
    block = train._Run._block

    def fed_with(self: Any, at: int) -> int:
        index = block(self, at)
        name = self.rows.parent.name.removesuffix(".unfinished")
        fed.setdefault(name, []).append(self.blocks.tokens[index].tolist())
        return index

    monkeypatch.setattr(train._Run, "_block", fed_with)
    go("score")
    streams = {
        seed: [fed[f"{name}-seed-{seed}"] for name in ("whole", "score", "scratch")]
        for seed in (0, 1)
    }
    for seed, (first, *others) in streams.items():
        assert all(other == first for other in others), seed
    assert streams[0][0] != streams[1][0]
    attempt = fed["sweep-score-lr-0.001"]
    assert attempt == streams[0][0][: len(attempt)]


def test_fresh_weights_are_of_the_shape_and_of_no_use(place: Path) -> None:
    for name in ("score", "uneven"):
        loaded = load(str(place / name))
        one, same, other = (relearn_cells._fresh(loaded, seed) for seed in (0, 0, 1))
        shapes = {n: p.shape for n, p in loaded.model.named_parameters()}
        assert {n: p.shape for n, p in one.named_parameters()} == shapes
        every = zip(one.parameters(), same.parameters(), other.parameters(), strict=True)
        alike = [(a.equal(b), a.equal(c)) for a, b, c in every if a.std() > 0]
        assert alike == [(True, False)] * len(alike)
        tokens = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(0))
        assert not torch.allclose(one(tokens).logits, loaded.model(tokens).logits)


def test_a_run_with_nothing_left_is_at_about_1(go: Any) -> None:
    found = go("fresh", tokens=3072, lrs="3e-3", points=6, seeds=1)
    one = found.answers.of("fresh")
    assert 0.8 < (one.ratio or one.at_least) < 1.25
    assert found.answers.of("whole").target == one.target


def test_an_uneven_run_has_fresh_weights_of_its_own(go: Any) -> None:
    found = go("score", "uneven", tokens=256, lrs="1e-3", seeds=1, points=2)
    fresh = [s for s in found.subjects if s.kind == "scratch"]
    assert [(s.name, s.like) for s in fresh] == [("scratch", ("score",)),
                                                 ("scratch-2", ("uneven",))]  # fmt: skip
    assert found.answers.of("uneven").scratch == "scratch-2"
    assert found.answers.of("whole").scratch == "scratch"


# The held-out text chooses nothing ------------------------------------------------------------


def test_another_held_out_text_changes_nothing_but_the_figures(
    go: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks_of = inputs.blocks_of

    def swapped(loaded: Any, domain: Any, part: Any, recipe: Any, **given: Any) -> Any:
        found = blocks_of(loaded, domain, part, recipe, **given)
        return found if part != "held_out" else found.only(torch.arange(len(found.tokens)).flip(0))

    monkeypatch.setattr(inputs, "blocks_of", swapped)
    other = go().folder
    same = place / "audit"
    assert told(other)["domain"]["test"]["sha256"] != told(same)["domain"]["test"]["sha256"]
    assert rows(other)[0]["loss"] != rows(same)[0]["loss"]
    for ours, theirs in zip(told(other)["lines"], told(same)["lines"], strict=True):
        assert ours["lr"] == theirs["lr"]
        # Not only the choice but every figure that it follows from, and all training.
        strip = ("seconds",)
        for a, b in zip(ours["tried"], theirs["tried"], strict=True):
            assert {k: a[k] for k in a if k not in strip} == {k: b[k] for k in b if k not in strip}
    assert curves(other) == curves(same)


def curves(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        file.name: [
            {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"}
            for line in file.read_text().splitlines()
        ]
        for file in sorted((folder / "curves").iterdir())
    }


def test_attempts_never_see_held_out_text(go: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    attempted = relearn_cells.attempted
    sums = relearn_cells.benchmark.document_sums

    def watched(*args: Any) -> Any:
        before = len(seen)
        found = attempted(*args)
        assert len(seen) == before
        return found

    monkeypatch.setattr("llm_narrow.relearn.attempted", watched)
    monkeypatch.setattr(
        relearn_cells.benchmark, "document_sums",
        lambda model, blocks, *rest: seen.append(blocks.sha256) or sums(model, blocks, *rest),
    )  # fmt: skip
    go("score", seeds=1)
    assert len(set(seen)) == 1
    assert len(seen) == 1 + 3 * (1 + len(places(6, ASKED["points"])))


# Stopped and gone on --------------------------------------------------------------------------


def test_a_stop_within_a_training_gives_the_same_rows(
    go: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = train._Run._advance
    steps = 0

    def stopped(self: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 25:  # of the first run after the whole model's
            raise KeyboardInterrupt
        return advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(train._Run, "_advance", stopped)
        with pytest.raises(KeyboardInterrupt) as told_so:
            go(save_every_minutes=1e-6)  # a state after each step
    assert "go on with the same command" in told_so.value.__notes__[0]
    resumed = go().folder
    assert rows(resumed) == rows(place / "audit")
    assert curves(resumed) == curves(place / "audit")
    assert told(resumed)["answers"] == told(place / "audit")["answers"]


KILLED = """
import sys
from llm_narrow.relearn import relearn
from proof import ASKED
place, out = sys.argv[1:]
relearn([f"{place}/score", f"{place}/random"], domain=f"{place}/lost", out=out,
        **{**ASKED, "save_every_minutes": 1e-6})
"""


@pytest.mark.long
def test_killed_and_gone_on_with_gives_the_same_rows(
    go: Any, place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "audit"
    paths = [str(Path(__file__).parent), *sys.path]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, place, out],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        while process.poll() is None and not (out / "work/score-seed-0.unfinished/state").is_dir():
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()[1].decode()
    finally:
        process.kill()
        process.communicate()
    resumed = go().folder
    assert rows(resumed) == rows(place / "audit")
    assert curves(resumed) == curves(place / "audit")
    assert {p.name for p in resumed.iterdir()} == {p.name for p in (place / "audit").iterdir()}


def test_a_finished_audit_is_answered_again_without_training(
    go: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "audit", tmp_path / "audit")
    monkeypatch.setattr("llm_narrow.relearn_cells.train", None)
    first = go()
    assert first.answers.of("score").goal == "scratch"
    loss = told(place / "audit")["lines"][1]["curve"][-1]["loss"]["value"]
    again = go(target=str(loss))
    assert again.answers.of("score").tokens == pytest.approx(768)
    assert rows(tmp_path / "audit") == rows(place / "audit")
    with pytest.raises(TypeError):  # another run is trained
        go("score", "random", "fresh")


def test_a_rate_that_diverges_loses_and_is_told(go: Any, tmp_path: Path) -> None:
    found = go("score", lrs="1e30,1e-3", seeds=1, tokens=512, sweep_share=1.0)
    line = next(x for x in found.answers.lines if x.subject.name == "score")
    assert line.lr == 1e-3
    assert "error" in line.tried[0]
    with pytest.raises(NarrowError, match="No learning rate"):
        go("score", lrs="1e30,1e35", seeds=1, tokens=512, sweep_share=1.0, out=tmp_path / "b")


# What a user is told --------------------------------------------------------------------------


def test_a_dry_run_writes_nothing(go: Any, tmp_path: Path, place: Path) -> None:
    found = go(dry_run=True)
    assert not (tmp_path / "audit").exists()
    f = found.forecast
    assert (f.runs, f.sweeps, f.runs_done) == (4 * 2, 4 * 2, 0)
    per_step, attempt = 128, math.ceil(0.2 * 768 / 128)
    assert f.tokens == per_step * (8 * 6 + 8 * attempt)
    assert f.seconds > 0
    assert f.timed == "a timed pass"
    shutil.copytree(place / "audit", tmp_path / "audit")
    left = go(dry_run=True).forecast
    assert (left.runs_done, left.sweeps_done, left.seconds) == (8, 8, 0.0)
    assert left.timed == "finished runs"


def test_the_command_line(
    run: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = ["relearn", place / "score", "--domain", place / "lost", "--out", tmp_path / "audit"]
    small = ["--length", "32", "--validation-tokens", "256", "--held-out-tokens", "256",
             "--lrs", "1e-3", "--seeds", "1", "--points", "2"]  # fmt: skip
    done = run(*audit, *small, "--tokens", "256", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["answers"]["goal"] == "whole"
    assert told(tmp_path / "audit")["command"].startswith("llm-narrow relearn")
    assert told(tmp_path / "audit")["settings"]["train"]["schedule"] == "constant"
    again = run(*audit, *small, "--tokens", "256")
    assert "Tokens to relearn" in again.out
    refused(run(*audit, *small, "--tokens", "512"), "Go on with those, or choose another --out")
    refused(run(*audit, "--tokens", "many"), "--tokens must be")
    refused(run(*audit, *small, "--tokens", "256", "--target", "-1"), "--target must be a loss")
    dry = run(*audit[:-1], tmp_path / "dry", *small, "--tokens", "256", "--dry-run")
    assert "runs: 3 in full" in dry.out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lrs": "fast"}, "--lrs must be numbers above 0, got 'fast'"),
        ({"lrs": "1e-3,1e-3"}, "none of them twice"),
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"sweep_share": 0}, "--sweep-share must be above 0"),
        ({"points": 1}, "--points must be at least 2"),
        ({"margin": -1}, "--margin must be at least 0"),
        ({"tokens": 0}, "--tokens must be above 0"),
        ({"target": "half"}, "--target must be a loss above 0"),
        ({"domain": "englsh"}, "Did you mean 'english'"),
        ({"held_out_tokens": "1M"}, "Ask for fewer tokens"),
    ],
)
def test_bad_input(go: Any, tmp_path: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(NarrowError) as error:
        go("score", **given)
    assert words in str(error.value)
    assert not (tmp_path / "audit").exists()


def test_runs_that_are_none(go: Any, place: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a finished run folder"):
        go("text")
    with pytest.raises(BadInput, match="named twice"):
        go("score", "score")
    with pytest.raises(BadInput, match="at least one run"):
        relearn([], domain="english", tokens=1)
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit/notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="is no audit"):
        go("score")


def test_runs_of_other_models(go: Any, place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(place / "score", other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["model"]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="began with different models"):
        go("score", str(other))
    with pytest.raises(BadInput, match="is not the model that"):
        go(str(other))
    manifest["model"] = None
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="does not say which model"):
        go(str(other))


def test_another_tokenizer_is_refused(go: Any, place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(place / "score", other)
    file = other / "model/tokenizer.json"
    found = json.loads(file.read_text())
    found["model"]["merges"] = found["model"]["merges"][:-20]
    file.write_text(json.dumps(found))
    with pytest.raises(BadInput, match="another tokenizer"):
        go("score", str(other))


def test_the_whole_model_is_found_through_several_runs(place: Path, tmp_path: Path) -> None:
    first = {"model": {"name": "whole", "sha256": "a"}}
    second = {"model": {"name": str(tmp_path / "one/model"), "sha256": "b"}}
    (tmp_path / "one").mkdir()
    (tmp_path / "one/manifest.json").write_text(json.dumps(first))
    assert whole_of(second) == first["model"]
    recovered = {"model": {"name": "gone", "sha256": "b"}, "made_from": first}
    assert whole_of(recovered) == first["model"]


def test_domains_are_as_everywhere(place: Path, tmp_path: Path) -> None:
    """A folder of one's own with a glob; the whole model may have moved."""
    write_domain(tmp_path / "mixed")
    moved = write_model(tmp_path / "moved")
    found = relearn(
        [place / "score"], domain=str(tmp_path / "mixed"), glob="**/*.txt", whole=str(moved),
        out=tmp_path / "audit", **{**ASKED, "tokens": 256, "lrs": "1e-3", "seeds": 1},
    )  # fmt: skip
    assert found.subjects[0].model == str(moved)


def test_fresh_weights_have_the_shape_of_a_model_without_halves_of_layers(
    prune: Any, tmp_path: Path
) -> None:
    done = prune("--kinds", "mlp,neurons", "--target-params", "70%", "--multiple", "1")
    assert done.code == 0, done.err
    loaded = load(str(tmp_path / "run"))
    fresh = relearn_cells._fresh(loaded, 0)
    own, new = (
        {n: tuple(p.shape) for n, p in m.named_parameters()} for m in (loaded.model, fresh)
    )
    assert own == new
    made = [[type(part) for part in m.modules()] for m in (loaded.model, fresh)]
    assert made[0] == made[1]  # nothing stands where a half went, in both
    assert 0 in {n for shape in own.values() for n in shape}  # a half really went


@pytest.mark.parametrize(
    ("told", "method"),
    [
        ({}, "oneshot"),
        ({"recipe": {"score": {"criterion": "random"}}}, "random"),
        ({"recipe": {"prune": {"method": "lasso"}}}, "lasso"),
        # of `recover`, which has a recipe of its own
        ({"recipe": {"prune": {"method": "oneshot"}}, "lasso": {"removed": 3}}, "lasso"),
        ({"compare": {"method": "distilled"}, "lasso": {"removed": 3}}, "distilled"),
    ],
)
def test_how_a_run_was_made(told: dict[str, Any], method: str) -> None:
    assert method_of(told) == method
