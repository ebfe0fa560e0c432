"""`llm-narrow init`: what it asks, what it refuses, and that `prune` takes what it writes."""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from commands import left_behind, refused
from llm_narrow import init, init_recipes, init_schema, init_text, models, recipe
from llm_narrow.errors import BadInput, NarrowError
from llm_narrow.init_recipes import EDITOR, SCHEMA
from llm_narrow.recipe import FLAGS
from llm_narrow.scores import CRITERIA

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))


class Replies:
    """A person at the terminal: gives one answer after the other, and keeps what was said."""

    def __init__(self, *replies: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.screen = [*replies], io.StringIO()
        self.console = Console(file=self.screen, width=200)
        monkeypatch.setattr("builtins.input", self.next)

    def next(self, prompt: str = "") -> str:
        if not self.left:
            raise EOFError
        return self.left.pop(0)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_defaults_are_a_recipe(run: Any, place: Path) -> None:
    done = run("init", "mine.yaml", "--yes")
    assert done.code == 0, done.err
    assert "llm-narrow prune --recipe mine.yaml --dry-run" in done.out
    found = recipe.load("mine.yaml", criteria=CRITERIA)
    assert (found.model.name, found.domain.name) == ("smollm2-135m", "python")
    assert found.prune.sparsity_by_kind == {"neurons": 0.5} and not found.trains
    assert left_behind(place) == ["mine.yaml"]


def test_flags_are_the_answers(run: Any, place: Path, domain_folder: Path) -> None:
    done = run(
        "init", "runs/mine.yaml", "--yes", "--model", "Qwen/Qwen3-0.6B", "--domain", domain_folder,
        "--glob", "**/*.txt", "--target", "60%", "--kinds", "vocabulary,neurons",
        "--machine", "cluster", "--recover-tokens", "5M", "--forget", "english,python", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["file"] == "runs/mine.yaml"
    assert told["next"][1].startswith("torchrun ")
    found = recipe.load("runs/mine.yaml", criteria=CRITERIA)
    assert found.resolved() == told["recipe"]
    assert found.domain.glob == "**/*.txt" and found.prune.target_params == "60%"
    assert found.prune.vocabulary == "domain" and found.prune.chosen_kinds == ("neurons",)
    assert found.score.forget == ("english", "python")
    assert found.recover.tokens == 5_000_000 and found.train.sharded and found.train.checkpointing


@pytest.mark.parametrize(
    ("machine", "tokens", "batch"), [("laptop", 0, 2), ("gpu", 20_000_000, 8), ("cluster", 5e7, 8)]
)
def test_a_machine_has_its_own_defaults(place: Path, machine: str, tokens: int, batch: int) -> None:
    found = init.write(Path("mine.yaml"), {"machine": machine}).recipe
    assert (found.recover.tokens, found.blocks.batch_size) == (tokens, batch)
    assert found == recipe.load("mine.yaml", criteria=CRITERIA)


def test_every_setting_is_told_with_its_rule(place: Path) -> None:
    init.write(Path("mine.yaml"), {"machine": "gpu"})
    text = Path("mine.yaml").read_text()
    settings = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(settings) >= 7 and all(" # " in line for line in settings)
    assert "  tokens: 20M # a whole number of at least 0 tokens, as 200k" in settings
    assert {init_text.rule(name) for name in FLAGS if name not in ("seed", "device", "dtype")}
    tried = re.sub(r"^# {0,2}(?=[a-z]+:|  )", "", text, flags=re.MULTILINE)
    tried = tried.replace("#   ", "  ")
    (place / "tried.yaml").write_text("\n".join(li for li in tried.splitlines() if ":" in li[:16]))
    assert recipe.load(place / "tried.yaml").score.forget == ("english",)


@pytest.mark.parametrize(
    ("target", "setting"),
    [
        ("0.5", ("sparsity", 0.5)),
        ("neurons=0.5,heads=0.2", ("sparsity", {"neurons": 0.5, "heads": 0.2})),
        ("60%", ("target_params", "60%")),
        ("90M", ("target_params", "90M")),
        ("1.5B", ("target_params", "1.5B")),
        ("200MB", ("target_size", "200MB")),
        ("1.5GiB", ("target_size", "1.5GiB")),
    ],
)
def test_a_target_is_of_any_unit(place: Path, target: str, setting: tuple[str, Any]) -> None:
    found = init.write(Path("mine.yaml"), {"target": target}).recipe
    assert getattr(found.prune, setting[0]) == setting[1]


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("--model", "smollm2-135n", "Did you mean 'smollm2-135m'?"),
        ("--model", "./nowhere", "./nowhere does not exist"),
        ("--domain", "pyton", "Did you mean 'python'?"),
        ("--domain", "./nowhere", "There is no folder or file ./nowhere"),
        ("--glob", "*.rs", "glob does not apply to python; leave it out"),
        ("--target", "50", "--target must be a share of the units to remove"),
        ("--target", "1.5", "got '1.5'"),
        ("--target", "160%", "got '160%'"),
        ("--target", "small", "got 'small'"),
        ("--target", "neurons=2", "got 'neurons=2'"),
        ("--machine", "phone", "--machine 'phone' is unknown. Known: cluster, gpu, laptop."),
        ("--recover-tokens", "many", "--recover-tokens must be a whole number of at least 0"),
        ("--forget", "swedish", "Domain 'swedish' is unknown"),
        ("--kinds", "neuron", "--kinds must be one or more of neurons"),
        ("--template", "papr", "Template 'papr' is unknown. Did you mean 'paper'?"),
    ],
)
def test_a_wrong_answer_is_told_in_a_line(
    run: Any, place: Path, flag: str, value: str, told: str
) -> None:
    refused(run("init", "mine.yaml", "--yes", flag, value), told)
    assert left_behind(place) == []


def test_nothing_is_overwritten_without_force(run: Any, place: Path) -> None:
    Path("mine.yaml").write_text("my notes")
    refused(run("init", "mine.yaml", "--yes"), "mine.yaml exists already", "--force")
    assert Path("mine.yaml").read_text() == "my notes"
    assert run("init", "mine.yaml", "--yes", "--force").code == 0
    assert recipe.load("mine.yaml").domain.name == "python"
    Path("folder").mkdir()
    refused(run("init", "folder", "--yes", "--force"), "folder is a folder")


def test_without_a_terminal_it_does_not_ask(run: Any, place: Path) -> None:
    refused(run("init", "mine.yaml"), "There is no terminal to ask on. Give --yes")
    assert left_behind(place) == []


def test_answers_are_checked_at_once_and_asked_for_again(
    place: Path, domain_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    person = Replies(
        "smollm2-135n", "smollm2-135m", str(domain_folder), "**/*.rs", "**/*.txt", "half", "70%",
        "laptop", "200k", "none", monkeypatch=monkeypatch,
    )  # fmt: skip
    done = init.write(Path("mine.yaml"), {}, console=person.console)
    assert not person.left
    said = person.screen.getvalue()
    for told in ("Did you mean 'smollm2-135m'?", "Try --glob '**/*'", "got 'half'"):
        assert said.count(told) == 1
    # In order: each question is asked until it is answered, with its default beside it.
    asked = [line for line in said.splitlines() if line.startswith(tuple(init.QUESTIONS.values()))]
    assert "(smollm2-135m)" in said and "(0.5)" in said
    assert done.recipe.domain.glob == "**/*.txt" and done.recipe.recover.tokens == 200_000
    assert done.recipe.prune.target_params == "70%" and done.recipe.score.forget is None
    assert asked


def test_enter_takes_the_defaults(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    person = Replies(*[""] * 6, monkeypatch=monkeypatch)
    done = init.write(Path("mine.yaml"), {}, console=person.console)
    assert done.recipe == init.write(Path("other.yaml"), {}).recipe and not person.left


def test_what_a_flag_says_is_not_asked(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    person = Replies("", "laptop", monkeypatch=monkeypatch)
    given = {"model": "pythia-70m", "domain": "english", "recover_tokens": "0", "forget": "none"}
    done = init.write(Path("mine.yaml"), given, console=person.console)
    assert (done.recipe.model.name, done.recipe.domain.name) == ("pythia-70m", "english")


def test_answers_that_end_early_leave_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    person = Replies("smollm2-135m", monkeypatch=monkeypatch)
    with pytest.raises(BadInput, match="The answers ended before domain"):
        init.write(Path("mine.yaml"), {}, console=person.console)
    assert left_behind(place) == []


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_ctrl_c_at_a_real_terminal_leaves_nothing(tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "llm_narrow", "init", "mine.yaml"], cwd=tmp_path,
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        # What was started in the background of a shell is deaf to it, and so are its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    os.close(theirs)
    said = b""
    while b"Domain" not in said:
        ready, _, _ = select.select([ours], [], [], 120)
        assert ready, said
        said += os.read(ours, 4096)
        if b"(smollm2-135m)" in said and b"\n" not in said.partition(b"(smollm2-135m)")[2]:
            os.write(ours, b"\n")
    for _ in range(8):  # one that comes just before the read is only seen after the next
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):  # a second one on its way out would kill it
            process.wait(15)
            break
    assert process.returncode == 130
    while select.select([ours], [], [], 0)[0]:
        try:
            said += os.read(ours, 4096)
        except OSError:  # Linux says so where the other end is closed
            break
    os.close(ours)
    assert b"Interrupted; nothing is left half-written." in said and b"Traceback" not in said
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("name", SHIPPED)
def test_a_template_is_the_shipped_recipe(name: str, place: Path) -> None:
    done = init.write(Path("mine.yaml"), {}, template=name)
    own, text = ROOT / f"recipes/{name}.yaml", Path("mine.yaml").read_text()
    assert done.recipe == recipe.load("mine.yaml") == recipe.load(own)
    assert text.replace("mine.yaml", f"recipes/{name}.yaml").splitlines()[1:] == (
        own.read_text().splitlines()[1:]
    )
    assert "--recipe mine.yaml" in text


@pytest.mark.parametrize("name", SHIPPED)
def test_flags_are_laid_over_a_template(name: str, place: Path) -> None:
    given = {"model": "pythia-70m", "domain": "english", "target": "40%", "machine": "gpu",
             "recover_tokens": "1M", "forget": "python"}  # fmt: skip
    source = recipe.load(ROOT / f"recipes/{name}.yaml")
    if source.domain.glob:
        del given["domain"]
    if source.dtype != "float32":  # which cannot be trained
        given["recover_tokens"] = "0"
    done = init.write(Path("mine.yaml"), given, template=name, force=True)
    read = recipe.load("mine.yaml", criteria=CRITERIA)
    assert read == done.recipe
    assert read.prune.target_params == "40%" and read.prune.sparsity is None
    assert (read.model.name, read.score.forget) == ("pythia-70m", ("python",))
    if given["recover_tokens"] != "0":
        assert (read.recover.tokens, read.train.accumulation) == (1_000_000, 4)
    init.write(Path("mine.yaml"), {"target": "heads=0.5"}, template=name, force=True)
    assert recipe.load("mine.yaml").prune.sparsity_by_kind == {"heads": 0.5}


def test_an_answer_that_sets_nothing_takes_away_what_a_template_sets(place: Path) -> None:
    done = init.write(Path("mine.yaml"), {"forget": "none"}, template="forget-domain")
    assert done.recipe.score.forget is None
    done = init.write(Path("all.yaml"), {"glob": "all"}, template="own-repository")
    assert recipe.load(ROOT / "recipes/own-repository.yaml").domain.glob
    assert done.recipe.domain.glob is None


def test_lines_that_are_not_changed_stay(place: Path) -> None:
    text = "# head\na_line: 1\nprune:\n  kinds:\n    - heads\n  multiple: 64 # widths\n\nblocks:\n"
    changed = init_text.edited(text, {"kinds": "neurons", "length": 32, "recover_tokens": "0"})
    assert changed == (
        "# head\na_line: 1\nprune:\n  kinds: [neurons]\n  multiple: 64 # widths\n\nblocks:\n"
        "  length: 32\nrecover:\n  tokens: 0\n"
    )


def test_list_shows_what_each_is_for(run: Any) -> None:
    told = json.loads(run("init", "--list", "--json").out)["recipes"]
    assert [one["name"] for one in told] == SHIPPED
    shown = run("init", "--list").out
    assert all(name in shown for name in SHIPPED) and "--template NAME" in shown


def test_recipes_are_found_in_the_package_and_at_the_top_of_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert init_recipes.folder() == ROOT / "recipes"
    inside = tmp_path / "site-packages/llm_narrow"
    monkeypatch.setattr(init_recipes, "__file__", str(inside / "init_recipes.py"))
    with pytest.raises(BadInput, match="are missing from the installation"):
        init_recipes.folder()
    (inside / "recipes").mkdir(parents=True)
    (inside / "recipes" / SCHEMA).write_text("{}")
    assert init_recipes.folder() == inside / "recipes"


def test_schema_is_printed(run: Any) -> None:
    done = run("init", "--schema")
    assert json.loads(done.out) == init_schema.schema() and done.out == init_schema.text()


def test_editors_find_the_schema_of_what_is_written(place: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    init.write(Path("mine.yaml"), {})
    first = Path("mine.yaml").read_text().splitlines()[0]
    assert first.startswith(f"{EDITOR}file:///")
    file = Path(first.removeprefix(f"{EDITOR}file://"))
    told = json.loads(file.read_text())
    jsonschema.Draft202012Validator(told).validate(yaml.safe_load(Path("mine.yaml").read_text()))


def test_models_are_checked_without_fetching(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **given: object) -> None:
        raise AssertionError("fetched")

    for name in ("hub.download", "packages.fetch", "from_gguf.convert"):
        monkeypatch.setattr(f"llm_narrow.{name}", never)
    (tmp_path / "some.gguf").touch()
    for name in ("smollm2-135m", "pythia-70m@main", "ORG/NAME@v1", str(model_folder),
                 str(tmp_path / "some.gguf")):  # fmt: skip
        models.check(name)
    (tmp_path / "empty").mkdir()
    for name in ("nothing", "a/b/c", str(tmp_path / "empty"), str(tmp_path / "no.gguf"),
                 "smollm2-135m@main"):  # fmt: skip
        with pytest.raises(NarrowError):
            models.check(name)
