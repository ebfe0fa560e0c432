"""The pages that are made of finished runs: true to what the runs and their results say."""

import importlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from commands import SMALL
from folders import sentences, write_domain, write_model
from llm_narrow import certificate, cli
from llm_narrow.bench_tasks import Benched
from llm_narrow.choices import Likelihood, Pair
from llm_narrow.errors import BadInput
from llm_narrow.matrix import Matrix
from llm_narrow.matrix_rows import choice_row, loss_row, selectivities
from llm_narrow.matrix_scores import Score
from llm_narrow.matrix_sets import Item
from llm_narrow.relearn_answers import Subject, answers, line_of
from llm_narrow.rows import Estimate
from llm_narrow.sandbox import Protection
from llm_narrow.task_rows import Difference, TaskRow, mcnemar, share
from proof import write_lost
from test_tasks import HUMANEVAL

SCRIPTS = Path(__file__).resolve().parent.parent / "examples" / "bench"
TRAIN = ["--validation-tokens", "64", "--evaluate-every", "2"]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)


def module(name: str) -> Any:
    return importlib.import_module(name)


def command(*words: object) -> int:
    """The true command line, in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A whole model, its domain, a lost one; runs `plain`, `forgetful` and `again`. Do not write.

    They are made by the true command line; `again` is `plain` recovered.
    """
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_narrow.checkpoint.verify", lambda *args, **given: 0.0)
        patch.setattr("llm_narrow.outcome.draw", lambda *args: None)
        patch.setenv("LLM_NARROW_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        write_model(folder / "whole")
        write_domain(folder / "text")
        write_lost(folder / "lost")
        start = ["prune", "--model", "whole", "--domain", "text", *SMALL, "--sparsity", "0.5",
                 "--no-speed", "--samples", "0", "--forget", "lost",
                 "--forget-weight", "0"]  # fmt: skip
        assert command(*start, "--forget-refit", "0", "--out", "plain") == 0
        assert command(*start, "--forget-refit", "0.5", "--out", "forgetful") == 0
        assert command("recover", "plain", "--tokens", "128", "--no-speed", "--samples", "0",
                       "--length", "32", *TRAIN, "--out", "again") == 0  # fmt: skip
        yield folder


@pytest.fixture
def runs(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in a folder of the test's own, which is where it is."""
    for name in ("plain", "forgetful", "again"):
        shutil.copytree(place / name, tmp_path / name)
    for name in ("whole", "text", "lost"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def json_of(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found


# Forgetting ----------------------------------------------------------------------------------


def test_forgetting_tells_what_the_runs_say(runs: Path) -> None:
    module("forgetting").main(["--runs", "forgetful,plain", "--out", "docs/forgetting"])
    found = json_of(runs / "docs/forgetting.json")
    plain, other = found["rows"]
    assert [plain["name"], other["name"]] == ["plain", "forgetful"]
    assert (plain["forget_refit"], other["forget_refit"]) == (0, 0.5)
    assert plain["cost"] == 0
    bits = []
    for row in (plain, other):
        told = json_of(runs / row["name"] / "manifest.json")
        after = json.loads((runs / row["name"] / "rows.jsonl").read_text().splitlines()[1])
        assert row["command"] == told["command"]
        assert row["off"]["lost"].items() >= told["forget"]["domains"]["lost"].items()
        assert row["bits_per_byte_ratio"]["high"] == after["bits_per_byte_ratio_high"]
        bits.append(after["bits_per_byte"])
    assert other["cost"] == pytest.approx(bits[1] / bits[0] - 1)
    text = (runs / "docs/forgetting.md").read_text()
    assert plain["command"] in text and other["command"] in text
    assert "differ in" not in text


def edited(runs: Path, name: str, **given: Any) -> str:
    """A copy of `plain` with other figures and settings, as a run with them would have them."""
    folder = Path(shutil.copytree(runs / "plain", runs / name))
    told = json_of(folder / "manifest.json")
    told["recipe"]["score"]["forget_weight"] = given.get("weight", 0.0)
    told["recipe"]["prune"]["forget_refit"] = given.get("refit", 0.0)
    if given.get("refit"):
        told["refit"]["forget"] = given["refit"]
    told["forget"]["domains"]["lost"]["selectivity"] = given.get("selectivity", 4.0)
    told["recipe"]["seed"] = given.get("seed", told["recipe"]["seed"])
    (folder / "manifest.json").write_text(json.dumps(told))
    before, after = map(json.loads, (folder / "rows.jsonl").read_text().splitlines())
    after["bits_per_byte"] = 2.0 * (1 + given.get("cost", 0.0))
    after["parameters"] = given.get("parameters", after["parameters"])
    (folder / "rows.jsonl").write_text(f"{json.dumps(before)}\n{json.dumps(after)}\n")
    return name


def test_the_best_is_the_most_selective_that_costs_no_more(runs: Path) -> None:
    names = [
        edited(runs, "zero"), edited(runs, "some", refit=0.1, selectivity=10.0, cost=0.01),
        edited(runs, "little", refit=0.05, selectivity=9.0, cost=-0.001),
        edited(runs, "much", refit=1.0, selectivity=30.0, cost=0.021),
        edited(runs, "odd", weight=1.0, selectivity=None, cost=0.0, seed=7),
    ]  # fmt: skip
    line = ["--runs", ",".join(names), "--out", "page"]
    module("forgetting").main(line)
    found = json_of(runs / "page.json")
    assert found["about"]["best"] == {"lost": "some"}
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["much"]["off"]["lost"]["against_plain"] == 7.5
    assert rows["odd"]["off"]["lost"]["against_plain"] is None
    text = (runs / "page.md").read_text()
    assert "**some** (weight 0, refit 0.1) is more selective" in text
    assert "10, 2.50 times as much, at least the 2 times" in text and "at +1.00%" in text
    assert "| odd | 1 | 0 |" in text and "| not defined | not defined |" in text
    assert "`seed`: zero 0" in text and "odd 7" in text  # what else differs is told
    svg = (runs / "page.svg").read_text()
    assert svg.startswith("<?xml") and ">much<" in svg and ">odd<" not in svg
    module("forgetting").main([*line, "--most-cost", "3%"])
    assert json_of(runs / "page.json")["about"]["best"] == {"lost": "much"}
    module("forgetting").main(["--runs", "zero,much", "--out", "page"])
    assert json_of(runs / "page.json")["about"]["best"] == {"lost": None}
    assert "the cheapest is much at +2.10%" in (runs / "page.md").read_text()


def test_runs_that_cannot_be_compared_are_refused_at_once(runs: Path) -> None:
    go = module("forgetting").main
    edited(runs, "big", refit=0.2, parameters=10**9)
    told = json_of(runs / "plain/manifest.json")
    bare = Path(shutil.copytree(runs / "plain", runs / "bare"))
    (bare / "manifest.json").write_text(json.dumps({**told, "forget": None}))
    with pytest.raises(BadInput, match=r"(?s)2 problems.*bare was made without.*again is a run of"):
        go(["--runs", "plain,bare,again", "--out", "page"])
    with pytest.raises(BadInput, match="big has another size than plain: 1,000,000,000"):
        go(["--runs", "plain,big", "--out", "page"])
    with pytest.raises(BadInput, match=r"none is the plain run .*--forget-refit 0"):
        go(["--runs", "forgetful", "--out", "page"])
    edited(runs, "twice")
    with pytest.raises(BadInput, match="plain and twice have the same forgetting"):
        go(["--runs", "plain,twice", "--out", "page"])
    told["domain"]["sha256"]["held_out"] = "0" * 64
    (bare / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(BadInput, match=r"bare has another domain than plain: text \(000"):
        go(["--runs", "plain,bare", "--out", "page"])
    with pytest.raises(SystemExit):
        go(["--runs", "plain", "--most-cost", "0.02"])
    assert not list(runs.glob("page*"))


# The page of a narrowed model, all by the true commands ---------------------------------------


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has narrow.py's commands run in this process, as they are; the list of what was run."""
    ran: list[str] = []

    def run(line: Sequence[str], stdout: Any) -> Any:
        assert [*line[:3]] == [sys.executable, "-m", "llm_narrow"]
        ran.append(line[3] if line[3] != "bench" else line[line.index("bench") + 3])
        with pytest.MonkeyPatch.context() as patch:
            if not isinstance(stdout, int):
                patch.setattr(sys, "stdout", open(stdout.name, "w"))  # noqa: SIM115
            code = command(*line[3:])
            if not isinstance(stdout, int):
                sys.stdout.close()
        return subprocess.CompletedProcess(line, code)

    monkeypatch.setattr(module("narrow_steps").subprocess, "run", run)
    return ran


@pytest.fixture
def options(runs: Path) -> list[str]:
    """Tiny sets, budgets and settings."""
    texts = [{"text": sentences(50 + n, 2)} for n in range(4)]
    asked = [{"context": sentences(n, 2), "choices": ["unit", "code"], "answer": n % 2}
             for n in range(4)]  # fmt: skip
    for name, rows in {"texts": texts, "asked": asked, "small": HUMANEVAL[:2]}.items():
        (runs / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--sets", "domain,texts.jsonl,asked.jsonl", "--limit", "4", "--tasks", "small.jsonl",
        "--prompt", "raw", "--max-new-tokens", "4", "--lost", "lost", "--tokens", "256",
        "--also", "relearn=--length 32 --lrs 1e-3 --points 2 --held-out-tokens 64 --target scratch",
        "--also", f"relearn={' '.join(TRAIN)}", "--out", "docs/narrow", "--results", "results",
    ]  # fmt: skip


def test_everything_is_made_once_and_told(
    runs: Path, options: list[str], inside: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    go = module("narrow").main
    line = ["--runs", "cut=plain,back=again", *options]
    go(line)
    (bare, _) = json_of(runs / "docs/narrow.json")["rows"]
    assert not inside and bare["matrix"] is bare["tasks"] is None
    assert [one["what"] for one in bare["missing"]] == [
        "matrix", "tasks", "relearning of lost", "certificate (there is none)"
    ]  # fmt: skip
    text = (runs / "docs/narrow.md").read_text()
    assert "Of cut nothing can be said on matrix, tasks, relearning of lost" in text
    assert "llm-narrow bench whole plain --matrix domain,texts.jsonl,asked.jsonl" in text
    go([*line, "--run"])
    assert inside == ["--matrix", "--matrix", "--tasks", "--tasks", "relearn", "certify", "certify"]
    assert "(7 of 7) certify back: llm-narrow certify again" in capfd.readouterr().err
    cut, back = json_of(runs / "docs/narrow.json")["rows"]
    assert not cut["missing"] and not back["missing"]
    assert (back["made"], back["trained"]) == ("oneshot, 128 tokens of training", 128)
    assert len(back["commands"]) == 2 and back["commands"][0] == cut["commands"][0]
    matrix = json_of(runs / "results/cut/matrix.json")
    mine = [r for r in matrix["losses"] if r["sha256"] == cut["sha256"]]
    assert [t["after"]["value"] for t in cut["matrix"]["texts"]] == [
        r["bits_per_byte"] for r in mine
    ]
    assert cut["matrix"]["selectivities"][0]["off"] == "texts.jsonl"
    (solved,) = cut["tasks"]["rows"]
    assert (solved["problems"], solved["share"]) == (2, None)
    assert cut["tasks"]["together"][0]["passed"] == [0, 0]
    (audit,) = cut["relearning"]
    assert {a["goal"] for a in audit["answers"]} == {"whole", "scratch"}
    held = certificate.load(runs / "plain")
    assert held is not None and held.relearning[0].command == audit["command"]
    assert cut["own"]["increase"]["value"] == held.on_domain.increase.value
    text = (runs / "docs/narrow.md").read_text()
    for one in (*cut["commands"], cut["matrix"]["command"], audit["command"], held.command):
        assert one in text
    assert "Nothing: every run has every result." in text
    assert "the whole model passes nothing: these problems tell nothing" in text
    assert "cut passes nothing" not in text
    assert str(runs) not in text
    go([*line, "--run"])
    assert len(inside) == 7  # nothing was repeated
    go([*line, "--run", "--limit", "3", "--steps", "certify,matrix"])
    assert inside[7:] == ["--matrix", "--matrix", "certify", "certify"]


def test_a_command_that_fails_leaves_nothing_and_is_told(
    runs: Path, options: list[str], inside: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    line = ["--runs", "cut=plain", *options, "--run", "--steps", "matrix,certify"]
    with pytest.raises(SystemExit) as ended:
        module("narrow").main([*line, "--sets", "nonsense"])
    assert ended.value.code == 1 and inside == ["--matrix", "certify"]
    assert "matrix of cut ended with exit code 2: llm-narrow bench" in capfd.readouterr().err
    assert not list((runs / "results/cut").iterdir())
    (row,) = json_of(runs / "docs/narrow.json")["rows"]
    assert row["missing"][0]["what"] == "matrix" and row["certificate"]


def test_commands_are_processes_of_their_own(runs: Path, options: list[str]) -> None:
    line = ["--runs", "cut=plain", *options, "--run", "--steps", "matrix", "--sets", "texts.jsonl"]
    module("narrow").main(line)
    (row,) = json_of(runs / "docs/narrow.json")["rows"]
    made = json_of(runs / "results/cut/matrix.json")
    assert row["matrix"]["texts"][0]["after"]["value"] == made["losses"][1]["bits_per_byte"]
    assert (runs / "results/cut/matrix.sh").read_text() == f"{row['matrix']['command']}\n"


# The page of results that are written by the parts of the product that write them --------------

LOST = {"domain": 0.1, "mbpp-python": 0.12, "mbpp-go": 0.3, "mbpp-rust": 0.5, "lambada": 0.05}
GROUP: Any = {"domain": "domain", "lambada": "prose"}


def score(nats: Sequence[float], name: str) -> Score:
    return Score(name, 10, 0, tuple(Likelihood(n, 3, False) for n in nats))


def matrix_of(run: Any, file: Path, *, times: float = 1.0, right: int = 3, items: int = 20) -> None:
    """What `bench --matrix` prints: LOST (nats per byte) off the domain `times` over."""
    models = {"whole": run.before.sha256, "narrow": run.after.sha256}
    names = [str(n) for n in range(items)]
    losses, every = [], {model: {} for model in models}  # type: ignore[var-annotated]
    for key, by in LOST.items():
        rise = by * (times if key not in ("domain", "mbpp-python") else 1.0)
        every["whole"][key] = [score([10.0 + int(n) % 3], n) for n in names]
        every["narrow"][key] = [score([10.0 + int(n) % 3 + 10 * rise], n) for n in names]
        group = GROUP.get(key, "languages")
        for model, sha in models.items():
            first = None if model == "whole" else every["whole"][key]
            own = key in ("domain", "mbpp-python")
            losses.append(loss_row(key, group, own, model, sha, every[model][key], first, "x"))
    asked = [Item(n, (Pair("", " a"), Pair("", " b")), 0, (1, 1)) for n in names]
    answered = {
        "whole": [score([1, 2] if int(n) < 16 else [2, 1], n) for n in names],
        "narrow": [score([1, 2] if int(n) < right else [2, 1], n) for n in names],
    }
    choices = [
        choice_row("sciq", asked, True, model, sha, answered[model],
                   None if model == "whole" else answered["whole"], "x")
        for model, sha in models.items()
    ]  # fmt: skip
    ratios = selectivities(
        "narrow", {k: GROUP.get(k, "languages") for k in LOST}, ["domain", "mbpp-python"],
        every["whole"], every["narrow"],
    )  # fmt: skip
    sets = {
        key: {"group": GROUP.get(key, "languages"), "own": key in ("domain", "mbpp-python"),
              "items": items, "sha256": f"{key}{items}", "source": "x"}
        for key in LOST
    }  # fmt: skip
    sets["sciq"] = {"group": "knowledge", "own": False, "items": items, "sha256": "q",
                    "source": "x"}  # fmt: skip
    rows = (tuple(losses), tuple(choices), tuple(ratios))
    told = Matrix(models, *rows, sets, Path("x"), ("a note",))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(told.facts()))


def tasks_of(run: Any, file: Path, *passed: tuple[str, int, int, int, int]) -> None:
    """What `bench --tasks` prints: of each set its problems, the whole one's passes, won, lost."""
    rows = []
    for task, problems, had, won, lost in passed:
        for model, sha, right in (
            ("whole", run.before.sha256, had), ("narrow", run.after.sha256, had + won - lost)
        ):  # fmt: skip
            one = share([1.0] * right + [0.0] * (problems - right))
            difference = None if model == "whole" else Difference(
                {1: Estimate((won - lost) / problems, -0.5, 0.5)}, won, lost, mcnemar(won, lost)
            )  # fmt: skip
            rows.append(TaskRow(
                task, model, sha, "chat", 0.0, 1, problems, {1: one}, share([1.0]), share([0.5]),
                {}, (), 10, 5.0, "x", difference,
            ))  # fmt: skip
    on = (Protection("user", "x", True, True), Protection("ipc", "x", False, False, "no"))
    file.parent.mkdir(parents=True, exist_ok=True)
    facts = Benched(tuple(rows), {t: "d" for t, *_ in passed}, on, Path("x")).facts()
    file.write_text(json.dumps(facts))


def audit_of(runs: Sequence[Any], folder: Path) -> None:
    """The folder of an audit in which fresh weights need 100 tokens, `cut` 20 and others 90."""

    def subject(name: str, kind: Any, sha: str | None, like: tuple[str, ...] = ()) -> Subject:
        return Subject(name, kind, kind, name, sha, "shape", 1, 1.0, like)

    def curve(name: str, *points: tuple[int, float]) -> list[dict[str, Any]]:
        return [
            {"subject": name, "seed": 0, "trained": tokens, **{
                f"{what}{end}": loss
                for what in ("loss", "bits_per_byte", "accuracy") for end in ("", "_low", "_high")
            }}
            for tokens, loss in points
        ]  # fmt: skip

    names = tuple(run.name for run in runs)
    every = [subject("whole", "whole", runs[0].before.sha256),
             *(subject(run.name, "run", run.after.sha256) for run in runs),
             subject("scratch", "scratch", None, names)]  # fmt: skip
    rows = [*curve("whole", (0, 2.0), (50, 1.5), (400, 1.2)),
            *curve("scratch", (0, 6.0), (100, 3.0), (400, 2.5))]  # fmt: skip
    for name in names:
        rows += curve(name, (0, 5.0), (20 if name == "cut" else 90, 3.0), (400, 2.4))
    found = answers([line_of(s, rows, 1e-3, []) for s in every], rows, target=3.0)
    folder.mkdir(parents=True)
    told = {"domain": {"name": "english", "sha256": {"held_out": "h"}}, "notes": ["a rate"],
            "command": "llm-narrow relearn runs", **found.to_dict()}  # fmt: skip
    (folder / "relearn.json").write_text(json.dumps(told))


@pytest.fixture
def made(runs: Path) -> list[str]:
    """Results of `plain` and `forgetful`; the options that name them."""
    read = module("finished").read
    both = [read(runs / "plain", "cut"), read(runs / "forgetful", "forgot")]
    for run, times in zip(both, (1.0, 4.0), strict=True):
        matrix_of(run, runs / "results" / run.name / "matrix.json", times=times)
    tasks_of(both[0], runs / "results/cut/tasks.json", ("humaneval", 30, 10, 1, 2),
             ("mbpp", 50, 10, 0, 10))  # fmt: skip
    tasks_of(both[1], runs / "results/forgot/tasks.json", ("humaneval", 30, 10, 2, 2),
             ("mbpp", 50, 10, 1, 2))  # fmt: skip
    audit_of(both, runs / "results/relearn-english")
    return ["--runs", "cut=plain,forgot=forgetful", "--results", "results", "--out", "page"]


def shown(runs: Path, part: str) -> str:
    """A part of the page."""
    text = (runs / "page.md").read_text()
    return text.partition(f"## {part}\n")[2].partition("\n## ")[0]


def test_figures_stand_where_they_belong(runs: Path, made: list[str]) -> None:
    module("narrow").main(made)
    cut, forgot = json_of(runs / "page.json")["rows"]
    languages = cut["matrix"]["groups"]["languages"]
    assert languages["sets"] == ["mbpp-go", "mbpp-rust"]  # not the domain's own
    bits = [11 / 10 / math.log(2) + by / math.log(2) for by in (0.3, 0.5)]
    before = sum(10 + n % 3 for n in range(20)) / 200 / math.log(2)
    assert languages["before"]["value"] == pytest.approx(before)
    low, high = languages["after"]["low"], languages["after"]["high"]
    assert (low, high) == pytest.approx([b - 1.1 / math.log(2) + before for b in bits])
    assert languages["after"]["value"] == pytest.approx((low + high) / 2)
    ratio = (0.4 + 0.05) / 2 / 0.1  # languages, prose
    assert forgot["plain"] == {"name": "cut", "selectivity_ratio": pytest.approx(4.0)}
    text = shown(runs, "On the domain and off it")
    assert f"| {ratio:.2f} | 4.00 |  |" in text
    assert f"| {4 * ratio:.2f} | 16.00 | 4.00 (cut) |" in text
    assert "| nats per byte above the whole | domain | mbpp-python | 2 other languages |" in text
    assert f"| mbpp-rust {before:.3f} | +0.500 | +2.000 |" in text and "- a note" in text
    assert "put there by hand" in text
    assert "| sciq (20) | 50.0% | 80.0% (" in shown(runs, "Questions of general knowledge")
    text = shown(runs, "Programs that run")
    assert "| humaneval, chat (30): cut | 30.0% (" in text and "| 1/2, 1 |" in text
    assert "| humaneval + mbpp, chat: cut | 9 of 80 | 0.45 (" in text
    assert "Sandbox: NOT active: ipc (no)." in text
    text = shown(runs, "Relearning")
    assert "english: cut | 2.000, 5.000 → 2.400 | given, 3.000 |" in text
    assert "llm-narrow relearn runs" in text and "- a rate" in text


def test_what_is_weak_is_found_in_the_figures(runs: Path, made: list[str]) -> None:
    module("narrow").main(made)
    weak = json_of(runs / "page.json")["about"]["weak"]
    assert shown(runs, "Where it is weak").strip() == "\n".join(f"- {one}" for one in weak)

    def said(*words: str) -> bool:
        return any(all(word in one for word in words) for one in weak)

    assert said("cut has lost most on mbpp-rust (+0.500", "mbpp-go (+0.300")
    assert said("cut has lost more on mbpp-python, of its domain too")
    assert said("cut has lost no more than on its domain", "lambada (+0.050)")
    assert said("cut answers fewer questions of sciq (-65.0%") and said("guessing", "sciq")
    assert said("cut passes nothing of mbpp (chat, 50 problems), where the whole model passes 20")
    assert said("cut passes too few of all problems (chat): 9 and not 20, 0.45")
    assert said("forgot is not surely at 80% of the whole model's passes", "0.95")
    assert said("cut is not shown to have lost english for good", "fresh weights: 0.2 (1 is")
    assert not said("forgot is not shown to have lost")
    assert said("Of cut nothing can be said on certificate (there is none)")
    assert not said("forgot passes nothing") and not said("forgot is no more selective")
    own = json_of(runs / "page.json")["rows"][0]["own"]["increase"]["value"]
    assert said("cut has lost on its own domain") == (own > 0.02)
    module("narrow").main([*made, "--least-pass", "40%", "--most-cost", "1000%"])
    weak = json_of(runs / "page.json")["about"]["weak"]
    assert not said("too few") and not said("on its own domain")


def test_results_of_other_weights_do_not_count(runs: Path, made: list[str]) -> None:
    file = runs / "results/cut/matrix.json"
    run = module("finished").read(runs / "plain", "cut")
    other = replace(run, after=replace(run.after, sha256="0" * 64))
    matrix_of(other, file)
    module("narrow").main(made)
    cut, forgot = json_of(runs / "page.json")["rows"]
    assert cut["matrix"] is None and cut["missing"][0]["what"] == "matrix of these weights"
    assert forgot["plain"] == {"name": "cut", "selectivity_ratio": None}
    assert "| cut | not measured | not measured |" in (runs / "page.md").read_text()
    matrix_of(run, file, items=10)
    with pytest.raises(BadInput, match=r"matrix\.json of forgot is of other items"):
        module("narrow").main(made)
    file.write_text(json.dumps({**json_of(file), "form": 2}))
    with pytest.raises(BadInput, match=r"is not what `matrix` writes .*form 2, and this reads 1"):
        module("narrow").main(made)


def test_the_share_is_paired() -> None:
    share = module("narrow_found").share

    def pair(problems: int, had: int, won: int, lost: int) -> tuple[Mapping[str, Any], ...]:
        was = {"pass_at_1": had / problems, "problems": problems}
        return was, {"pass_at_1": (had + won - lost) / problems, "problems": problems,
                     "won": won, "lost": lost}  # fmt: skip

    assert share([pair(164, 20, 0, 0)]) == {"value": 1.0, "low": 1.0, "high": 1.0}
    one = share([pair(164, 20, 3, 5), pair(500, 40, 0, 4)])
    assert one["value"] == pytest.approx(54 / 60)
    assert 0.7 < one["low"] < one["value"] < one["high"] < 1.05
    apart = share([pair(164, 20, 15, 20)])  # others are solved: the same share is less sure
    alike = share([pair(164, 20, 0, 5)])
    assert apart["value"] == alike["value"] and apart["low"] < alike["low"]
    assert share([pair(10, 0, 2, 0)]) is None


def test_bad_options_are_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go = module("narrow").main
    with pytest.raises(BadInput, match=r"(?s)4 problems.*NAME=FOLDER.*'tasks' is what.*nope"):
        go(["--runs", "plain,tasks=plain,a=plain,a=plain,b=nope"])
    for flags in (["--steps", "matrix,nap"], ["--also", "nap=--x"], ["--least-pass", "0.8"]):
        with pytest.raises(SystemExit) as ended:
            go(["--runs", "a=plain", *flags])
        assert ended.value.code == 2
    assert "must be of matrix, tasks, bench, relearn, certify, got 'nap'" in capsys.readouterr().err


def test_how_a_run_was_made_in_words(runs: Path) -> None:
    run = module("finished").read(runs / "forgetful")
    assert run.made == "oneshot, forgetting lost (weight 0, refit 0.5), no training"
    lasso = replace(run, told={**run.told, "lasso": {"removed_zero": 1}, "recover": {"tokens": 5}})
    assert lasso.made.startswith("lasso, ") and lasso.made.endswith("5 tokens of training")
