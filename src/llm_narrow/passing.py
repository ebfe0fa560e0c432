"""How often a model solves a problem: complete the prompts, run the programs, estimate pass@k.

    found = evaluate(model, tokenizer, tasks.load("humaneval"), rows=Path("humaneval.jsonl"))
    print(found.pass_at[1])

pass@k is the chance that at least one of k samples passes, estimated without bias from n ≥ k
samples of which c passed: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, equation 1).
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from .cost import evaluating
from .errors import BadInput, problems
from .measure import bootstrap, stop_tokens
from .progress import Track, silent
from .rows import Estimate
from .sandbox import LIMITS, Limits, run
from .tasks import Problem, Prompt, cut, outcome, parses, program_of

KS = (1, 10, 100)
Key = tuple[str, int]  # the name of a problem, and the number of the sample


@dataclass(frozen=True)
class Completion:
    """What a model wrote, and its number of tokens; `whole` unless the limit cut it short."""

    text: str
    tokens: int
    whole: bool


@dataclass(frozen=True)
class Verdict:
    """What came of one sample: `kind` and `detail` are of the Outcome."""

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
class Passing:
    """How a model does on problems. Estimates have a bootstrap interval over the problems.

    `tokens` and `seconds` are of the completions made in this call, not of those found in `rows`.
    """

    prompt: Prompt
    samples: int
    problems: int
    pass_at: dict[int, Estimate]
    parsed: Estimate
    whole: Estimate
    verdicts: tuple[Verdict, ...] = field(repr=False)
    tokens: int = 0
    seconds: float = 0.0

    def facts(self) -> dict[str, Any]:
        """What `--json` prints, the verdicts left out."""
        return {name: value for name, value in asdict(self).items() if name != "verdicts"}


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; temperature 0 takes the likeliest token."""

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise BadInput with all that breaks a rule."""
        wrong = [
            f"{name} must be at least 1, got {value}"
            for name, value in (("samples", self.samples), ("max_new_tokens", self.max_new_tokens))
            if value < 1
        ]
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
            raise problems("sampling", wrong)


def evaluate(
    model: Any,
    tokenizer: Any,
    found: Sequence[Problem],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    seed: int = 0,
    prompt: Prompt = "completion",
    batch_size: int = 8,
    workers: int = 2,
    limits: Limits = LIMITS,
    allow_unsandboxed: bool = False,
    rows: Path | None = None,
    identity: str = "",
    track: Track = silent,
) -> Passing:
    """Complete every problem `samples` times, run all in the sandbox, and estimate pass@k.

    With `rows`, completions and verdicts are written there as they come, and what is there already
    is not made again; `identity` (the hash of the weights) keeps two models from sharing a file.
    Raises BadInput for bad settings, rows of other settings, a tokenizer without a chat template,
    or a machine that does not allow the sandbox, all before anything is generated.
    """
    sampling = Sampling(samples, temperature, top_p, max_new_tokens, seed)
    _check(tokenizer, found, prompt, batch_size, workers)
    run("", allow_unsandboxed=allow_unsandboxed)  # refuses now rather than after hours
    named = {p.name: p for p in found}
    keys = [(name, sample) for sample in range(samples) for name in named]
    settings = {"prompt": prompt, "identity": identity, "problems": _digest(found)}
    settings |= asdict(replace(sampling, samples=1))  # more of them go on where fewer ended
    book = _Book(rows, settings)
    started = time.monotonic()
    lacking = [key for key in keys if key not in book.completions]
    for batch in _completions(
        model, tokenizer, named, lacking, sampling, prompt, batch_size, track
    ):
        book.add_completions(batch)
    seconds = time.monotonic() - started

    def judge(key: Key) -> tuple[Key, str, str]:
        problem = named[key[0]]
        program = program_of(problem, book.completions[key].text, prompt)
        came = outcome(problem, program, limits=limits, allow_unsandboxed=allow_unsandboxed)
        return key, came.kind, came.detail

    unjudged = [key for key in keys if key not in book.verdicts]
    pool = ThreadPoolExecutor(workers)
    try:
        for key, kind, detail in track(
            pool.map(judge, unjudged), "running programs", len(unjudged)
        ):
            book.add_verdict(key, kind, detail)
    finally:
        pool.shutdown(cancel_futures=True)
    verdicts = tuple(
        Verdict(
            *key, *book.verdicts[key], completion=book.completions[key],
            parses=parses(program_of(named[key[0]], book.completions[key].text, prompt)),
        )
        for key in keys
    )  # fmt: skip
    made = sum(book.completions[key].tokens for key in lacking)
    return summed(verdicts, prompt=prompt, tokens=made, seconds=seconds, seed=seed)


def summed(
    verdicts: Sequence[Verdict],
    *,
    prompt: Prompt = "completion",
    tokens: int = 0,
    seconds: float = 0.0,
    seed: int = 0,
) -> Passing:
    """The estimates that the verdicts give; every problem must have as many samples."""
    by_problem: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_problem.setdefault(verdict.problem, []).append(verdict)
    samples = min(len(group) for group in by_problem.values())

    def mean(value: Callable[[Sequence[Verdict]], float]) -> Estimate:
        values = torch.tensor([value(v) for v in by_problem.values()], dtype=torch.float64)
        sums = torch.stack([values, torch.ones_like(values)], 1)
        return bootstrap(sums, lambda s: s[..., 0] / s[..., 1], seed=seed)

    def at(k: int) -> Callable[[Sequence[Verdict]], float]:
        return lambda v: pass_at_k(len(v), sum(one.passed for one in v), k)

    return Passing(
        prompt=prompt,
        samples=samples,
        problems=len(by_problem),
        pass_at={k: mean(at(k)) for k in KS if k <= samples},
        parsed=mean(lambda v: sum(one.parses for one in v) / len(v)),
        whole=mean(lambda v: sum(one.completion.whole for one in v) / len(v)),
        verdicts=tuple(verdicts),
        tokens=tokens,
        seconds=seconds,
    )


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The unbiased estimate of pass@k from so many samples, of which so many passed."""
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise BadInput(
            f"pass@{k} of {passed} passed among {samples} samples: k must be from 1 to the number "
            "of samples. Draw more samples, or give a smaller k."
        )
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def _check(
    tokenizer: Any, found: Sequence[Problem], prompt: str, batch_size: int, workers: int
) -> None:
    wrong = []
    if not found:
        wrong.append("there are no problems; give at least one")
    if prompt not in get_args(Prompt):
        wrong.append(f"prompt must be one of {', '.join(get_args(Prompt))}, got {prompt!r}")
    for name, value in (("batch_size", batch_size), ("workers", workers)):
        if value < 1:
            wrong.append(f"{name} must be at least 1, got {value}")
    if prompt == "chat" and not getattr(tokenizer, "chat_template", None):
        wrong.append("the tokenizer has no chat template; give the prompt 'completion'")
    if wrong:
        raise problems("evaluation", wrong)


def _digest(found: Sequence[Problem]) -> str:
    return hashlib.sha256(json.dumps([asdict(p) for p in found]).encode()).hexdigest()


def _completions(
    model: Any,
    tokenizer: Any,
    named: Mapping[str, Problem],
    keys: Sequence[Key],
    sampling: Sampling,
    prompt: Prompt,
    batch_size: int,
    track: Track,
) -> Iterator[dict[Key, Completion]]:
    """Completions in batches of like length, the longest prompts first."""
    encoded = {name: _encoded(tokenizer, named[name], prompt) for name in {k[0] for k in keys}}
    ordered = sorted(keys, key=lambda key: (-len(encoded[key[0]]), key))
    batches = [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]
    for batch in track(batches, "completing"):
        chosen = [named[name] for name, _ in batch]
        # Of its keys, not its place: a run that was stopped between batches goes on as it would.
        drawn = hashlib.sha256(f"{sampling.seed} {batch}".encode()).digest()
        with torch.random.fork_rng(), torch.inference_mode(), evaluating(model):
            torch.manual_seed(int.from_bytes(drawn[:7]))
            made = _generated(
                model, tokenizer, chosen, [encoded[k[0]] for k in batch], sampling, prompt
            )
        yield dict(zip(batch, made, strict=True))


def _encoded(tokenizer: Any, problem: Problem, prompt: Prompt) -> list[int]:
    if prompt == "chat":
        asked = [{"role": "user", "content": problem.question}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)
        return list(ids["input_ids"])
    # Without the last line break: many tokenizers have "\n    " as one token, rare after a "\n".
    return list(tokenizer(problem.prompt.rstrip())["input_ids"])


def _generated(
    model: Any,
    tokenizer: Any,
    chosen: Sequence[Problem],
    encoded: Sequence[Sequence[int]],
    sampling: Sampling,
    prompt: Prompt,
) -> list[Completion]:
    """One batch, padded on the left. A prompt that fills the model's context is not completed."""
    most = getattr(model.config, "max_position_embeddings", None) or math.inf
    width = max(len(ids) for ids in encoded)
    new = int(min(sampling.max_new_tokens, most - width))
    if new < 1:
        if len(encoded) == 1:
            return [Completion("", 0, whole=False)]
        one_by_one = zip(chosen, encoded, strict=True)
        return [_generated(model, tokenizer, [p], [i], sampling, prompt)[0] for p, i in one_by_one]
    ends = stop_tokens(model, tokenizer)
    padding = next((i for i in (tokenizer.pad_token_id, *sorted(ends)) if i is not None), 0)
    ids = torch.full((len(encoded), width), padding)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(encoded):
        ids[row, width - len(own) :] = torch.tensor(own)
        mask[row, width - len(own) :] = 1
    how = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new, num_beams=1, repetition_penalty=1.0, pad_token_id=padding,
        eos_token_id=sorted(ends) or None, do_sample=sampling.temperature > 0,
        **(how if sampling.temperature > 0 else {}),
    )  # fmt: skip
    ended = _Ended(tokenizer, width, ends, [() if prompt == "chat" else p.stops for p in chosen])
    tokens = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
        generation_config=config, stopping_criteria=StoppingCriteriaList([ended]),
    ).cpu()  # fmt: skip
    lengths = [end if end is not None else tokens.shape[1] - width for end in ended.at]
    return [
        Completion(_decoded(tokenizer, row[width : width + n]), n, whole=end is not None)
        for row, n, end in zip(tokens, lengths, ended.at, strict=True)
    ]


def _decoded(tokenizer: Any, ids: Tensor) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Ended(StoppingCriteria):
    """Ends each row of a batch at its own stops, or a token that ends texts; remembers where."""

    def __init__(
        self, tokenizer: Any, width: int, ends: set[int], stops: Sequence[tuple[str, ...]]
    ) -> None:
        self.tokenizer, self.width, self.ends, self.stops = tokenizer, width, ends, stops
        self.at: list[int | None] = [None] * len(stops)  # tokens after the prompt

    def __call__(self, input_ids: Tensor, scores: object, **given: object) -> Tensor:
        """Which rows have ended, (rows,) bool."""
        for row, stops in enumerate(self.stops):
            if self.at[row] is None:
                made = input_ids[row, self.width :]
                text = _decoded(self.tokenizer, made)
                closed = not stops and text.count("```") > 1  # a chat's first block
                if closed or int(made[-1]) in self.ends or cut(text, stops) != text:
                    self.at[row] = len(made)
        return torch.tensor([at is not None for at in self.at], device=input_ids.device)


class _Book:
    """What a rows file holds: its settings, then completions and verdicts, one in each line."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.completions: dict[Key, Completion] = {}
        self.verdicts: dict[Key, tuple[str, str]] = {}
        if path is None:
            return
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # the writing of it was interrupted
        try:
            found = [json.loads(line) for line in lines]
            had = found[0]["settings"] if found else settings
            other = [f"{k} was {had[k]}, now {v}" for k, v in settings.items() if had[k] != v]
            for row in found[1:]:
                key = (row["problem"], row["sample"])
                if "text" in row:
                    self.completions[key] = Completion(row["text"], row["tokens"], row["whole"])
                else:
                    self.verdicts[key] = (row["kind"], row["detail"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{path} holds no rows of programming problems ({error!r}). Give another file."
            ) from error
        if other:
            other += ["give another file, or remove this one"]
            raise problems(f"{path} was begun with other settings", other)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(lines))
        if not found:
            self._write([{"settings": dict(settings)}])

    def add_completions(self, made: Mapping[Key, Completion]) -> None:
        self.completions.update(made)
        self._write([{"problem": k[0], "sample": k[1], **asdict(c)} for k, c in made.items()])

    def add_verdict(self, key: Key, kind: str, detail: str) -> None:
        self.verdicts[key] = (kind, detail)
        self._write([{"problem": key[0], "sample": key[1], "kind": kind, "detail": detail}])

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
