"""Which problems a model solves: complete the prompts in batches, run the programs, keep both.

    verdicts = evaluate(model, tokenizer, tasks.load("humaneval"), rows=Path("humaneval.jsonl"))
    print(sum(v.passed for v in verdicts))

What is made of them, pass@k and differences between models, is the work of `bench_tasks`.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import IO, Any, get_args

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from . import cost
from .cost import evaluating
from .errors import BadInput, problems
from .measure import stop_tokens
from .progress import Track, silent
from .sandbox import LIMITS, Limits, run
from .tasks import Problem, Prompt, answered, cut, digest, outcome, parses, program_of

TOO_LONG = "too long"  # the kind of a verdict on a prompt that the model has no positions for
Key = tuple[str, int]  # the name of a problem, and the number of the sample


@dataclass(frozen=True)
class Completion:
    """What a model wrote, and its number of tokens; `whole` unless a limit cut it short.

    `seconds` are its share of those of its batch.
    """

    text: str
    tokens: int
    whole: bool
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Verdict:
    """What came of one sample: `kind` and `detail` are of the Outcome, or TOO_LONG and why."""

    problem: str
    sample: int
    kind: str
    detail: str
    parses: bool
    completion: Completion

    @property
    def passed(self) -> bool:
        """Whether all tests held."""
        return self.kind == "passed"


@dataclass(frozen=True)
class Asking:
    """How a model is asked, and what it writes run. Temperature 0 takes the likeliest token.

    `about` is what else the answers depend on: the hash of the weights, say.
    """

    prompt: Prompt = "raw"
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0
    batch_size: int = 16
    limits: Limits = LIMITS
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise BadInput with all that breaks a rule."""
        wrong = [
            f"{name} must be at least 1, got {getattr(self, name)}"
            for name in ("samples", "max_new_tokens", "batch_size")
            if getattr(self, name) < 1
        ]
        if self.prompt not in get_args(Prompt):
            wrong.append(f"prompt must be one of {', '.join(get_args(Prompt))}, got {self.prompt}")
        if not (0 <= self.temperature < math.inf):
            wrong.append(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            wrong.append(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0 and self.samples > 1:
            wrong.append(
                f"{self.samples} samples at temperature 0 would all be the same; give a "
                "temperature (0.8, say), or one sample"
            )
        if wrong:
            raise problems("how a model is asked", wrong)

    def settings(self, found: Sequence[Problem]) -> dict[str, Any]:
        """All that completions and verdicts on the problems depend on, as plain data."""
        drawn: dict[str, Any] = {"temperature": self.temperature}
        if self.temperature:  # the number of samples is no part: more go on where fewer ended
            drawn |= {"top_p": self.top_p, "seed": self.seed}
        return {
            "problems": digest(found), "prompt": self.prompt, **drawn,
            "max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size,
            "limits": asdict(self.limits), **self.about,
        }  # fmt: skip


def evaluate(
    model: Any,
    tokenizer: Any,
    found: Sequence[Problem],
    how: Asking,
    *,
    workers: int = 2,
    allow_unsandboxed: bool = False,
    rows: Path | None = None,
    track: Track = silent,
) -> tuple[Verdict, ...]:
    """Complete every problem, run all completions in the sandbox; verdicts sample by sample.

    With `rows`, completions and verdicts are written there as they come, and what is there already
    is not made again. Raises BadInput for rows of other settings, what `encoded` refuses, or a
    machine that does not allow the sandbox, all before anything is generated.
    """
    encodings = encoded(model, tokenizer, found, how.prompt)
    if workers < 1:
        raise BadInput(f"workers must be at least 1, got {workers}.")
    run("", allow_unsandboxed=allow_unsandboxed)  # refuses now rather than after hours
    named, most = {p.name: p for p in found}, positions(model)
    fitting = {name: ids for name, ids in encodings.items() if len(ids) < most}

    def judged(key: Key) -> tuple[Key, str, str]:
        program = program_of(named[key[0]], book.completions[key].text, how.prompt)
        came = outcome(
            named[key[0]], program, limits=how.limits, allow_unsandboxed=allow_unsandboxed
        )
        return key, came.kind, came.detail

    def completed() -> Iterator[int]:
        for keys, new in lacking:
            started = time.monotonic()
            chosen = [(named[name], fitting[name]) for name, _ in keys]
            with torch.random.fork_rng(), torch.inference_mode(), evaluating(model):
                # Of its keys, not its place: a run that was stopped goes on as it would have.
                drawn = hashlib.sha256(f"{how.seed} {keys}".encode()).digest()
                torch.manual_seed(int.from_bytes(drawn[:7]))
                made = _generated(model, tokenizer, chosen, new, how)
            seconds = (time.monotonic() - started) / len(keys)
            book.complete(keys, [Completion(*one, seconds) for one in made])
            yield len(keys)

    with _book(rows, how.settings(found)) as book:
        batches = _batches(fitting, how, most)
        # A batch that is half there is made again whole: its shape may show in the last digits.
        lacking = [b for b in batches if any(key not in book.completions for key in b[0])]
        for _ in track(completed(), "completing in batches", len(lacking)):
            pass
        unjudged = [key for keys, _ in batches for key in keys if key not in book.verdicts]
        pool = ThreadPoolExecutor(workers)
        try:
            came = pool.map(judged, unjudged)
            for key, kind, detail in track(came, "running programs", len(unjudged)):
                book.judge(key, kind, detail)
        finally:
            pool.shutdown(cancel_futures=True)
    verdicts = []
    for sample in range(how.samples):
        for name, problem in named.items():
            if name in fitting:
                key, completion = (name, sample), book.completions[name, sample]
                python = parses(program_of(problem, completion.text, how.prompt))
                verdicts.append(Verdict(*key, *book.verdicts[key], python, completion))
            else:
                why = f"the prompt has {len(encodings[name])} tokens, the model {most} positions"
                nothing = Completion("", 0, whole=False)
                verdicts.append(Verdict(name, sample, TOO_LONG, why, False, nothing))
    return tuple(verdicts)


def encoded(
    model: Any, tokenizer: Any, found: Sequence[Problem], prompt: Prompt, name: str = "the model"
) -> dict[str, list[int]]:
    """The tokens of every prompt by the name of its problem.

    Raises BadInput where there is none, the tokenizer has no chat template that could be used for
    them, or all fill the context of the model, which is called `name`.
    """
    if not found:
        raise BadInput("There are no problems; give at least one.")
    if prompt == "chat" and not getattr(tokenizer, "chat_template", None):
        raise BadInput(f"The tokenizer of {name} has no chat template: give --prompt raw.")
    try:
        encodings = {p.name: _encoded(tokenizer, p, prompt) for p in found}
    except (TemplateError, ValueError, TypeError) as error:
        raise BadInput(
            f"The chat template of {name} cannot be used: {error}. Give --prompt raw."
        ) from error
    shortest = min(len(ids) for ids in encodings.values())
    if shortest >= positions(model):
        raise BadInput(
            f"All {len(found)} prompts fill the {positions(model)} positions of {name}: the "
            f"shortest has {shortest} tokens. Give a model with more, or shorter problems."
        )
    return encodings


def positions(model: Any) -> float:
    """How many tokens the model can read; infinite where it does not say."""
    return cost.positions(model) or math.inf


def _encoded(tokenizer: Any, problem: Problem, prompt: Prompt) -> list[int]:
    if prompt == "chat":
        asked = [{"role": "user", "content": problem.question}]
        ids = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_dict=True, enable_thinking=False
        )
        return list(ids["input_ids"])
    # Without the last line break: many tokenizers have "\n    " as one token, rare after a "\n".
    return list(tokenizer(problem.prompt.rstrip())["input_ids"])


def _batches(
    encodings: Mapping[str, Sequence[int]], how: Asking, most: float
) -> list[tuple[list[Key], int]]:
    """Keys that are completed together, with their most new tokens; the longest prompts first.

    Only those with room for equally many tokens go together, so that none is cut for another.
    """
    ordered = sorted(encodings, key=lambda name: (-len(encodings[name]), name))
    found, size = [], how.batch_size
    for sample in range(how.samples):
        for new, alike in groupby(
            ordered, lambda name: int(min(how.max_new_tokens, most - len(encodings[name])))
        ):
            keys = [(name, sample) for name in alike]
            found += [(keys[at : at + size], new) for at in range(0, len(keys), size)]
    return found


def _generated(
    model: Any,
    tokenizer: Any,
    chosen: Sequence[tuple[Problem, Sequence[int]]],
    new: int,
    how: Asking,
) -> list[tuple[str, int, bool]]:
    """One batch, padded on the left: text, tokens, and whether it ended by itself."""
    width = max(len(ids) for _, ids in chosen)
    ends = stop_tokens(model, tokenizer)
    padding = next((i for i in (tokenizer.pad_token_id, *sorted(ends)) if i is not None), 0)
    ids = torch.full((len(chosen), width), padding)
    mask = torch.zeros_like(ids)
    for row, (_, own) in enumerate(chosen):
        ids[row, width - len(own) :] = torch.tensor(own)
        mask[row, width - len(own) :] = 1
    drawn = {"temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new, pad_token_id=padding, eos_token_id=sorted(ends) or None,
        do_sample=how.temperature > 0, **(drawn if how.temperature > 0 else {}),
    )  # fmt: skip
    ended = _Ended(tokenizer, width, ends, [problem for problem, _ in chosen], how.prompt)
    own, model.generation_config = model.generation_config, GenerationConfig()  # type: ignore[no-untyped-call]
    try:  # the model's own would fill in what ours leaves open: penalties, forbidden words, …
        tokens = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
            generation_config=config, stopping_criteria=StoppingCriteriaList([ended]),
        ).cpu()  # fmt: skip
    finally:
        model.generation_config = own
    lengths = [tokens.shape[1] - width if end is None else end for end in ended.at]
    return [
        (_decoded(tokenizer, row[width : width + n]), n, end is not None)
        for row, n, end in zip(tokens, lengths, ended.at, strict=True)
    ]


def _decoded(tokenizer: Any, ids: Tensor) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Ended(StoppingCriteria):
    """Ends each row of a batch at its own stops, or a token that ends texts; remembers where."""

    def __init__(
        self, tokenizer: Any, width: int, ends: set[int], asked: Sequence[Problem], prompt: Prompt
    ) -> None:
        self.tokenizer, self.width, self.ends = tokenizer, width, ends
        self.asked, self.prompt = asked, prompt
        self.at: list[int | None] = [None] * len(asked)  # tokens after the prompt

    def __call__(self, input_ids: Tensor, scores: object, **given: object) -> Tensor:
        """Which rows have ended, (rows,) bool."""
        for row, problem in enumerate(self.asked):
            if self.at[row] is None:
                made = input_ids[row, self.width :]
                text = _decoded(self.tokenizer, made)
                over = answered(problem, text) if self.prompt == "chat" else (
                    cut(text, problem.stops) != text
                )  # fmt: skip
                if over or int(made[-1]) in self.ends:
                    self.at[row] = len(made)
        return torch.tensor([at is not None for at in self.at], device=input_ids.device)


@dataclass(frozen=True)
class _Book:
    """What a rows file holds after its settings: completions and verdicts, one in each line."""

    file: IO[bytes] | None = None
    completions: dict[Key, Completion] = field(default_factory=dict)
    verdicts: dict[Key, tuple[str, str]] = field(default_factory=dict)

    def complete(self, keys: Sequence[Key], made: Sequence[Completion]) -> None:
        self.completions.update(zip(keys, made, strict=True))
        self.write([_row(key, asdict(one)) for key, one in zip(keys, made, strict=True)])

    def judge(self, key: Key, kind: str, detail: str) -> None:
        self.verdicts[key] = (kind, detail)
        self.write([_row(key, {"kind": kind, "detail": detail})])

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.file is not None:
            self.file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            self.file.flush()
            os.fsync(self.file.fileno())

    def read(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            key = (row["problem"], row["sample"])
            if "text" in row:
                self.completions[key] = Completion(*(row[f.name] for f in fields(Completion)))
            else:
                self.verdicts[key] = (row["kind"], row["detail"])


def _row(key: Key, told: Mapping[str, Any]) -> dict[str, Any]:
    return {"problem": key[0], "sample": key[1], **told}


@contextmanager
def _book(path: Path | None, about: Mapping[str, Any]) -> Iterator[_Book]:
    """The rows file of these settings, begun or gone on with; no other process may write it."""
    if path is None:
        yield _Book()
        return
    import fcntl  # there is none on Windows, where `run` has refused already

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"{path} is being written by another benchmark. Wait for it, or give another --out."
            ) from None
        file.seek(0)
        held = file.read()
        book, whole = _Book(file), held.rfind(b"\n") + 1
        try:
            lines = [json.loads(line) for line in held[:whole].splitlines()]
            had = lines[0]["settings"] if lines else about
            other = [f"{k} was {had.get(k)}, now {v}" for k, v in about.items() if had.get(k) != v]
            book.read(lines[1:])
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{path} is damaged or holds other rows ({error!r}). Remove it to begin anew."
            ) from error
        if other:
            other += ["give another file, or remove this one"]
            raise problems(f"{path} was begun with other settings", other)
        file.truncate(whole)  # the writing of the last line was interrupted
        if not lines:
            book.write([{"settings": dict(about)}])
        yield book
