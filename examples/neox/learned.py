"""What train.py has measured, in words and tables: of `training.json`, which it leaves."""

from typing import Any

import results


def card(facts: dict[str, Any]) -> str:
    """README.md of the folder."""
    v = facts["vocabulary"]
    return "\n".join([
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags:",
        "- llm-narrow", "---", "",
        f"# A small gpt_neox, trained on {facts['domain']}", "",
        f"{facts['parameters']:,} parameters: {facts['layers']} layers of width {facts['hidden']}, "
        f"{facts['heads']} heads, {facts['intermediate']} neurons, parallel residual, biases and "
        f"LayerNorm as in Pythia. Its tokenizer is {facts['tokenizer']}, trimmed from "
        f"{v['whole']:,} to {v['rows']:,} tokens: those that come up at least {v['threshold']:,} "
        "times in the training text, and what these need. Trained from nothing on "
        f"{facts['tokens']:,} tokens, in {facts['steps']:,} steps. It is for trying out what "
        "narrowing does to this architecture, and good for nothing else.", "",
        table(facts), sentence(facts), "", "```sh", facts["command"], "```", "",
    ])  # fmt: skip


def table(facts: dict[str, Any]) -> str:
    """The figures beside what counting predicts, with 95 % intervals over documents."""
    names = {"model": "the model", "bigram": "bigrams of the same text (Kneser-Ney)",
             "unigram": "unigrams of the same text"}  # fmt: skip
    parts = {"validation": "other documents of the training part",
             "held_out": "other projects"}  # fmt: skip

    def cell(e: dict[str, float]) -> str:
        return f"{e['value']:.3f} ({e['low']:.3f} to {e['high']:.3f})"

    lines = [
        [f"{words}, {facts['figures'][part][name]['tokens']:,} tokens", predicts,
         *(cell(facts["figures"][part][name][key]) for key in ("loss", "bits_per_byte"))]
        for part, words in parts.items() for name, predicts in names.items()
    ]  # fmt: skip
    return results.table(["measured on", "predicted by", "nats per token", "bits per byte"], lines)


def sentence(facts: dict[str, Any]) -> str:
    """Whether something was learned, by the difference from the bigrams on the same documents."""
    above = facts["figures"]["validation"]["bigram"]["above"]
    learned = "knows more than" if above["low"] > 0 else "does not yet know more than"
    return (
        f"On the validation text the bigrams are {results.interval(above)} nats per token above "
        f"the model: it {learned} which token follows which."
    )
