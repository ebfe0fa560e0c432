"""Completions and verdicts from a tiny model and from one that writes what it is told to."""

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from folders import write_model
from llm_narrow import passing, sandbox
from llm_narrow.errors import BadInput
from llm_narrow.passing import Asking, evaluate
from test_tasks import ALL

TALK = "{% for m in messages %}Q: {{ m['content'] }}\nA:{% endfor %}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = write_model(tmp_path_factory.mktemp("tiny") / "model")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


class Perfect:
    """Stands for a model: it writes what it was given for each problem, token by token."""

    def __init__(self, tokenizer: Any, written: dict[str, str]) -> None:
        self.tokenizer, self.written, self.batches = tokenizer, written, 0
        self.config, self.device, self.training = SimpleNamespace(eos_token_id=None), "cpu", False
        self.generation_config = GenerationConfig()

    def eval(self) -> None: ...

    def train(self, training: bool) -> None: ...

    def generate(
        self, input_ids: Any, attention_mask: Any, generation_config: Any, stopping_criteria: Any
    ) -> torch.Tensor:
        self.batches += 1
        end = generation_config.eos_token_id[0]
        answers = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            assert mask.tolist() == sorted(mask.tolist()), "padded on the left"
            asked = self.tokenizer.decode(ids[mask.bool()])
            (name,) = [n for n, p in self.asked.items() if asked == p]
            answers.append([*self.tokenizer(self.written[name])["input_ids"], end])
        for step in range(generation_config.max_new_tokens):
            new = [[a[step] if step < len(a) else end] for a in answers]
            input_ids = torch.cat([input_ids, torch.tensor(new)], 1)
            if stopping_criteria(input_ids, None).all():
                break
        return input_ids

    @property
    def asked(self) -> dict[str, str]:
        return {p.name: p.prompt.rstrip() for p in ALL}


def references() -> dict[str, str]:
    return {p.name: f"\n{p.reference}" for p in ALL}


def passed(verdicts: Any) -> list[bool]:
    return [v.passed for v in verdicts]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_who_writes_the_reference_passes_all(tiny, batch_size):
    model = Perfect(tiny[1], references())
    found = evaluate(model, tiny[1], ALL, Asking(batch_size=batch_size))
    assert [(v.problem, v.sample) for v in found] == [(p.name, 0) for p in ALL]
    assert all(v.passed and v.parses and v.completion.whole for v in found)
    assert model.batches == math.ceil(5 / batch_size)
    assert all(v.completion.tokens > 0 and v.completion.seconds > 0 for v in found)


def test_what_is_wrong_says_why(tiny):
    written = {**references(), "Small/1": "\n    return 0", "MBPP/7": "\ndef sum(a, b:"}
    found = evaluate(Perfect(tiny[1], written), tiny[1], ALL, Asking())
    assert passed(found) == [True, False, True, False, True]
    assert [v.parses for v in found] == [True, True, True, False, True]
    assert (found[1].kind, found[1].detail) == ("failed", "AssertionError")
    assert found[3].detail.startswith("SyntaxError")


def test_writing_on_after_the_answer_is_stopped(tiny):
    written = {k: v + "\nprint('and so on for long')\n" * 20 for k, v in references().items()}
    found = evaluate(Perfect(tiny[1], written), tiny[1], ALL[:4], Asking())
    assert all(v.passed and v.completion.whole for v in found)
    assert max(v.completion.tokens for v in found) < 150
    short = evaluate(Perfect(tiny[1], written), tiny[1], ALL[:4], Asking(max_new_tokens=3))
    assert not any(v.passed or v.completion.whole for v in short)


def test_samples_of_a_random_model(tiny, monkeypatch):
    monkeypatch.setattr(passing, "outcome", lambda *args, **given: sandbox.Outcome("failed"))
    sampled: dict[str, Any] = {"samples": 10, "temperature": 1.0, "max_new_tokens": 8}
    found, again, other = (
        evaluate(*tiny, ALL[:2], Asking(seed=seed, **sampled)) for seed in (1, 1, 2)
    )
    texts = [[v.completion.text for v in one] for one in (found, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 10
    assert [v.sample for v in found] == [n for n in range(10) for _ in range(2)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_batch_is_completed_as_each_alone(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(passing, "outcome", lambda *args, **given: sandbox.Outcome("failed"))
    folder = write_model(tmp_path / kind, kind)
    model, tokenizer = (
        stock.from_pretrained(folder) for stock in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert model.dtype == torch.float32
    batch, alone = (
        evaluate(model, tokenizer, ALL, Asking(max_new_tokens=12, batch_size=size))
        for size in (5, 1)
    )
    assert [v.completion for v in batch] == [v.completion for v in alone]
    assert len({v.completion.text for v in batch}) > 1


def test_the_models_own_generation_settings_change_nothing(tiny, monkeypatch):
    monkeypatch.setattr(passing, "outcome", lambda *args, **given: sandbox.Outcome("failed"))
    model, tokenizer = tiny
    plain = evaluate(model, tokenizer, ALL, Asking(max_new_tokens=12))
    own = GenerationConfig(no_repeat_ngram_size=1, repetition_penalty=9.0, min_new_tokens=9,
                           do_sample=True, temperature=0.6, top_k=20, max_length=7)  # fmt: skip
    monkeypatch.setattr(model, "generation_config", own)
    told = evaluate(model, tokenizer, ALL, Asking(max_new_tokens=12))
    assert [v.completion for v in told] == [v.completion for v in plain]
    assert model.generation_config is own


def test_a_model_without_a_pad_token_is_told_nothing(tiny, monkeypatch, caplog, capfd):
    monkeypatch.setattr(passing, "outcome", lambda *args, **given: sandbox.Outcome("failed"))
    model, tokenizer = tiny
    assert tokenizer.pad_token is None and tokenizer.eos_token_id is not None
    monkeypatch.setattr(model.config, "pad_token_id", None)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    evaluate(model, tokenizer, ALL, Asking(max_new_tokens=4))
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_a_run_that_was_stopped_goes_on(tiny, tmp_path, monkeypatch):
    rows = tmp_path / "runs" / "rows.jsonl"
    how = Asking(batch_size=2, about={"weights": "abc"})
    stopping = Perfect(tiny[1], references())
    generate = stopping.generate

    def interrupted(**given: Any) -> torch.Tensor:
        if stopping.batches == 1:
            raise KeyboardInterrupt
        return generate(**given)

    monkeypatch.setattr(stopping, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(stopping, tiny[1], ALL, how, rows=rows)
    assert len(rows.read_text().splitlines()) == 3
    with rows.open("a") as file:
        file.write('{"problem": "Small/0", "sam')  # as a machine that lost power leaves it
    judged: list[str] = []
    run = passing.outcome

    def counted(problem: Any, *rest: Any, **given: Any) -> Any:
        judged.append(problem.name)
        return run(problem, *rest, **given)

    monkeypatch.setattr(passing, "outcome", counted)
    going_on = Perfect(tiny[1], references())
    found = evaluate(going_on, tiny[1], ALL, how, rows=rows)
    assert (going_on.batches, sorted(judged)) == (2, sorted(p.name for p in ALL))
    again = evaluate(Perfect(tiny[1], {}), tiny[1], ALL, how, rows=rows)
    assert len(judged) == 5
    assert again == found
    assert [v.completion.seconds for v in again] == [v.completion.seconds for v in found]


def test_half_a_batch_is_made_again_whole_and_more_samples_go_on(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(passing, "outcome", lambda *args, **given: sandbox.Outcome("failed"))
    settings: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 8, "batch_size": 2}
    whole = evaluate(*tiny, ALL, Asking(samples=3, **settings))
    rows = tmp_path / "rows.jsonl"
    evaluate(*tiny, ALL, Asking(samples=2, **settings), rows=rows)
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:4]))  # the settings, a batch, and half of the next
    assert evaluate(*tiny, ALL, Asking(samples=3, **settings), rows=rows) == whole
    for what, other in (("seed", {"seed": 1}), ("temperature", {"temperature": 0.5})):
        with pytest.raises(BadInput, match=rf"other settings[\s\S]*{what} was"):
            evaluate(*tiny, ALL, Asking(**{**settings, **other}), rows=rows)


def test_rows_that_cannot_be_gone_on_with(tiny, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"loss": 1}\n')
    with pytest.raises(BadInput, match="damaged or holds other rows"):
        evaluate(*tiny, ALL, Asking(), rows=other)
    assert other.read_text() == '{"loss": 1}\n'
    busy = tmp_path / "busy.jsonl"
    with passing._book(busy, {}), pytest.raises(BadInput, match="written by another benchmark"):
        evaluate(*tiny, ALL, Asking(), rows=busy)


def test_chat(tiny):
    model, tokenizer = Perfect(tiny[1], {}), tiny[1]
    with pytest.raises(BadInput, match="the model has no chat template: give --prompt raw"):
        evaluate(model, tokenizer, ALL, Asking(prompt="chat"))
    talking = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    talking.chat_template = "{{ nothing.at_all }}"
    with pytest.raises(BadInput, match="cannot be used: 'nothing' is undefined"):
        evaluate(model, talking, ALL, Asking(prompt="chat"))
    talking.chat_template = TALK
    written = {
        p.name: f" So:\n```python\n{p.prompt if p.prelude else ''}{p.reference}\n```\nGood luck!"
        for p in ALL
    }

    class Talking(Perfect):
        @property
        def asked(self) -> dict[str, str]:
            return {p.name: f"Q: {p.question}\nA:" for p in ALL}

    found = evaluate(Talking(talking, written), talking, ALL, Asking(prompt="chat"))
    assert passed(found) == [True] * 5
    assert all(v.completion.text.rstrip().endswith("```") for v in found)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompts_near_and_over_the_context(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(passing, "outcome", lambda *args, **given: sandbox.Outcome("failed"))
    models = []
    for most in (60, 256):
        folder = write_model(tmp_path / f"{kind}{most}", kind, max_position_embeddings=most)
        models.append(AutoModelForCausalLM.from_pretrained(folder))
    model, wide = models
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wide.load_state_dict({**wide.state_dict(), **{
        k: torch.cat([v, wide.state_dict()[k][60:]]) if v.shape != wide.state_dict()[k].shape else v
        for k, v in model.state_dict().items()
    }})  # fmt: skip
    lengths = {p.name: len(tokenizer(p.prompt.rstrip())["input_ids"]) for p in ALL}
    assert min(lengths.values()) < 55 < 60 < max(lengths.values())
    found = evaluate(model, tokenizer, ALL, Asking(batch_size=5))
    free = evaluate(wide, tokenizer, ALL, Asking(batch_size=5, max_new_tokens=21))
    for verdict, unbound in zip(found, free, strict=True):
        room = 60 - lengths[verdict.problem]
        if room <= 0:
            told = f"the prompt has {lengths[verdict.problem]} tokens, the model 60 positions"
            assert (verdict.kind, verdict.detail) == (passing.TOO_LONG, told)
            assert not (verdict.passed or verdict.parses or verdict.completion.whole)
        else:  # none is cut short because another prompt is longer
            assert 0 < verdict.completion.tokens <= room
            assert unbound.completion.text.startswith(verdict.completion.text.rstrip("\ufffd"))
            assert verdict.completion.whole or verdict.completion.tokens == room
    assert {v.kind for v in found} == {passing.TOO_LONG, "failed"}
    long = [p for p in ALL if lengths[p.name] >= 60]
    with pytest.raises(BadInput, match=r"All \d prompts fill the 60 positions of the model"):
        evaluate(model, tokenizer, long, Asking())


def test_bad_settings_are_told_at_once(tiny):
    with pytest.raises(BadInput, match=r"samples must be at least 1, got 0[\s\S]*top_p must be"):
        Asking(samples=0, top_p=0)
    with pytest.raises(BadInput, match="5 samples at temperature 0 would all be the same"):
        Asking(samples=5)
    with pytest.raises(BadInput, match=r"batch_size must be at least 1[\s\S]*prompt must be one"):
        Asking(batch_size=0, prompt="told")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="workers must be at least 1, got 0"):
        evaluate(*tiny, ALL, Asking(), workers=0)
    with pytest.raises(BadInput, match="no problems"):
        evaluate(*tiny, [], Asking())


def test_no_sandbox_is_told_before_anything_is_generated(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "_map_users", lambda process: b"refused\n")
    model = Perfect(tiny[1], references())
    with pytest.raises(BadInput, match=r"lacks user .*--allow-unsandboxed"):
        evaluate(model, tiny[1], ALL, Asking(), rows=tmp_path / "rows.jsonl")
    assert model.batches == 0
    assert list(tmp_path.iterdir()) == []
