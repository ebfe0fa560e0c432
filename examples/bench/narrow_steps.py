"""The commands that narrow.py has done: which are missing, each as a process of its own.

    RESULTS/NAME/matrix.json     what `bench WHOLE RUN --matrix … --json` printed; matrix.sh has it
    RESULTS/NAME/tasks.json      the same of `bench --tasks`, with tasks.sh
    RESULTS/NAME/bench.json      the same of `bench` (speeds; and the whole model's own figures)
    RESULTS/matrix/, tasks/      scores and answers of all models, so that the whole one is
                                 measured once, and a command that was stopped goes on
    RESULTS/relearn-DOMAIN/      one audit of all runs
    RUN/certificate.json         written by `certify`, from those of the above that are there

What is finished is not repeated: a result is finished where it is of these weights and made by the
same command. One without an .sh beside it was put there by hand, and stays.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finished import Finished

STEPS = ("matrix", "tasks", "bench", "relearn", "certify")
PRINTED = ("matrix", "tasks", "bench")  # whose result is what they print


@dataclass(frozen=True)
class Asked:
    """What is to be measured of the runs, as the options say it."""

    whole: str
    whole_sha256: str
    runs: Sequence[Finished]
    results: Path
    sets: str
    limit: int
    tasks: str
    prompt: str
    task_limit: int | None
    max_new_tokens: int
    lost: Sequence[str]
    tokens: str
    seeds: int
    also: Mapping[str, Sequence[str]]

    def file(self, run: Finished, step: str) -> Path:
        """Where the result of a step is."""
        return self.results / run.name / f"{step}.json"

    def audit(self, lost: str) -> Path:
        """The folder of the audit of a lost domain."""
        return self.results / f"relearn-{Path(lost).name}"


@dataclass(frozen=True)
class Step:
    """A command without its first word; `file` is where what it prints is kept, if anywhere."""

    what: str
    words: Sequence[str]
    file: Path | None
    done: Callable[[], bool]

    @property
    def line(self) -> str:
        """As it would be typed."""
        told = shlex.join(["llm-narrow", *self.words])
        return told if self.file is None else f"{told} > {shlex.quote(str(self.file))}"


def words_of(asked: Asked, step: str, run: Finished | None = None, lost: str = "") -> list[str]:
    """The words of a command, after `llm-narrow`."""
    also = list(asked.also.get(step, ()))
    if step == "relearn":
        from llm_narrow.relearn_subjects import whole_of

        moved = whole_of(asked.runs[0].told)["name"] != asked.whole
        return ["relearn", *(str(r.folder) for r in asked.runs), "--domain", lost, "--tokens",
                asked.tokens, "--seeds", str(asked.seeds), "--out", str(asked.audit(lost)),
                *(["--whole", asked.whole] if moved else []), *also]  # fmt: skip
    assert run is not None
    if step == "certify":
        return ["certify", str(run.folder), *_inputs(asked, run), *also]
    start = ["bench", asked.whole, str(run.folder)]
    if step == "bench":
        return [*start, *_domain(run), "--json", *also]
    place = ["--out", str(asked.results / step), "--json", *also]
    if step == "matrix":
        return [*start, "--matrix", asked.sets, *_domain(run), "--limit", str(asked.limit), *place]
    some = [] if asked.task_limit is None else ["--limit", str(asked.task_limit)]
    return [*start, "--tasks", asked.tasks, "--prompt", asked.prompt, "--max-new-tokens",
            str(asked.max_new_tokens), *some, *place]  # fmt: skip


def _domain(run: Finished) -> list[str]:
    """The flags that name the domain of a run."""
    from llm_narrow.options import flag
    from llm_narrow.recipe import FLAGS
    from llm_narrow.report import at

    section = at(run.told, "recipe", "domain") or {"name": run.after.domain}
    told = []
    for name, path in FLAGS.items():
        place, _, key = path.partition(".")
        if place == "domain" and section.get(key) is not None:
            told += [flag(name), str(section[key])]
    return told


def _inputs(asked: Asked, run: Finished) -> list[str]:
    """The results that a certificate of the run is made of, as flags of `certify`."""
    told = []
    for step in ("matrix", "bench"):
        if of_these(asked, run, step):
            told += [f"--{step}", str(asked.file(run, step))]
    for folder in audits(asked, run):
        told += ["--relearn", str(folder)]
    return told


def audits(asked: Asked, run: Finished) -> list[Path]:
    """The audits that the run is in, as it is."""
    folders = [asked.audit(lost) for lost in asked.lost]
    return [f for f in folders if run.after.sha256 in audited(f / "relearn.json")]


def audited(file: Path) -> set[str]:
    """The hashes of the models in an audit; none where there is no audit."""
    try:
        lines = json.loads(file.read_text("utf-8"))["lines"]
        return {line["subject"]["sha256"] for line in lines} - {None}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def hashes(file: Path) -> set[str]:
    """The hashes of the models in a matrix.json, tasks.json or bench.json; none without one."""
    try:
        found = json.loads(file.read_text("utf-8"))
        return {one["sha256"] for one in found.get("models") or found["rows"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def of_these(asked: Asked, run: Finished, step: str) -> bool:
    """Whether there is a result of the step that compares this run with the whole model."""
    return {asked.whole_sha256, run.after.sha256} <= hashes(asked.file(run, step))


def told_line(asked: Asked, run: Finished, step: str) -> str | None:
    """The command that made a result, where it was made here."""
    file = asked.file(run, step).with_suffix(".sh")
    return file.read_text("utf-8").strip() if file.is_file() else None


def step_of(asked: Asked, step: str, run: Finished | None = None, lost: str = "") -> Step:
    """One step as it is to be done now."""
    words = words_of(asked, step, run, lost)
    if run is None:
        every = {asked.whole_sha256, *(r.after.sha256 for r in asked.runs)}
        file = asked.audit(lost) / "relearn.json"
        same = shlex.join(["llm-narrow", *words])
        return Step(f"relearn {lost}", words, None,
                    lambda: every <= audited(file) and _command(file) == same)  # fmt: skip
    if step == "certify":
        return Step(f"certify {run.name}", words, None, lambda: not uncertified(asked, run))
    made = Step(f"{step} of {run.name}", words, asked.file(run, step), lambda: False)

    def done() -> bool:
        was = told_line(asked, run, step)
        return of_these(asked, run, step) and was in (None, made.line)

    return Step(made.what, words, made.file, done)


def uncertified(asked: Asked, run: Finished) -> str:
    """Why the certificate of a run is not that of the results that are there; empty if it is."""
    from llm_narrow import certificate
    from llm_narrow.errors import BadInput

    try:
        held = certificate.load(run.folder)
    except BadInput as error:
        return str(error)
    if held is None:
        return "there is none"
    free = {"command", "versions"}
    same = certified(asked, run).model_dump(exclude=free) == held.model_dump(exclude=free)
    return "" if same else "it is of other results than those that are here"


def certified(asked: Asked, run: Finished) -> Any:
    """What `certify` would write now. Raises BadInput for results of other weights."""
    from llm_narrow import certificate
    from llm_narrow.errors import BadInput

    bench = asked.file(run, "bench")
    try:
        return certificate.of(
            run.folder, relearn=audits(asked, run),
            matrix=asked.file(run, "matrix") if of_these(asked, run, "matrix") else None,
            bench=bench if of_these(asked, run, "bench") else None,
        )  # fmt: skip
    except BadInput as error:
        if "--bench" not in str(error):
            raise
        raise BadInput(f"{error} Here: {bench}, which --run --steps bench writes.") from None


def every(asked: Asked, names: Sequence[str]) -> Iterator[Step]:
    """The steps in their order, each made when it comes: a certificate has what came before it."""
    for step in STEPS:
        if step not in names:
            continue
        if step == "relearn":
            yield from (step_of(asked, step, None, lost) for lost in asked.lost)
        else:
            yield from (step_of(asked, step, run) for run in asked.runs)


def do(asked: Asked, names: Sequence[str], console: Any) -> list[str]:
    """Do what is missing. The steps that failed, each in words; those after it are done too."""
    failed = []
    total = sum(len(asked.lost if step == "relearn" else asked.runs) for step in names)
    for number, step in enumerate(every(asked, names), 1):
        if step.done():
            console.print(f"({number} of {total}) {step.what}: finished already")
            continue
        console.print(f"({number} of {total}) {step.what}: {step.line}", soft_wrap=True)
        start = time.monotonic()
        code = _run(step)
        took = f"{(time.monotonic() - start) / 60:.1f} minutes"
        if code:
            failed.append(f"{step.what} ended with exit code {code}: {step.line}")
            console.print(f"{step.what}: exit code {code} after {took}")
        else:
            console.print(f"{step.what}: {took}")
    return failed


def _run(step: Step) -> int:
    """The exit code; what is printed is kept whole, and only where the command went well."""
    line = [sys.executable, "-m", "llm_narrow", *step.words]
    if step.file is None:
        return subprocess.run(line, stdout=2).returncode  # beside ours
    step.file.parent.mkdir(parents=True, exist_ok=True)
    fresh = step.file.with_name(f".{step.file.name}")
    with fresh.open("wb") as out:
        code = subprocess.run(line, stdout=out).returncode
    if code:
        fresh.unlink()
        return code
    fresh.replace(step.file)
    step.file.with_suffix(".sh").write_text(f"{step.line}\n", "utf-8")
    return 0


def _command(file: Path) -> str:
    return str(json.loads(file.read_text("utf-8")).get("command"))
