"""What the commands share: flags, each declared once, and how they are read and answered.

Imports nothing heavy: this is read for `--help`.
"""

import inspect
import json as json_text
import os
import shlex
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .completion import NAMES, completed

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from .recipe import Recipe

PIPED = 160  # columns of tables that go to no terminal
LEAST = 80  # and of those in any
Given = Mapping[str, object]  # name of a setting -> value, None where its flag was not given


def _text(words: str, *names: str, metavar: str | None = None) -> Any:
    return Annotated[str | None, typer.Option(*names, help=words, metavar=metavar)]


def _whole(words: str) -> Any:
    return Annotated[int | None, typer.Option(help=words)]


def _number(words: str) -> Any:
    return Annotated[float | None, typer.Option(help=words)]


def _switch(words: str, *names: str) -> Any:
    return Annotated[bool | None, typer.Option(*names, help=words)]


def _tokens(words: str) -> Any:
    return _text(words, metavar="TOKENS")


RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="A YAML recipe; flags are laid over it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the result.")]
Debug = Annotated[bool, typer.Option("--debug", help="A traceback with errors.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what --out names.")]

OPTIONS: dict[str, Any] = {
    "model": _text("An alias (see `models`), a hub id, a folder or a .gguf file."),
    "domain": _text("A known domain (see `domains`), a folder, a file or a hub data set."),
    "revision": _text("Branch, tag or commit of a hub model."),
    "trust_remote_code": _switch("Run code that the model brings.", "--trust-remote-code"),
    "glob": _text("Which files of a folder, e.g. '**/*.rs'.", metavar="PATTERN"),
    "text_column": _text("The column that holds the text."),
    "project_column": _text("The column that says which project a text is of."),
    "max_documents": _whole("Read at most so many documents."),
    "length": _whole("Tokens of a block."),
    "batch_size": _whole("Blocks fed to the model at once."),
    "criterion": _text("How units are scored."),
    "calibration_tokens": _tokens("Tokens to score on, and to refit on."),
    "forget": _text("Domains, with commas between, that are to be forgotten."),
    "forget_weight": _number("How much their use counts against a unit; 0 unless given."),
    "forget_refit": _number("How much the refit unlearns them; 0.03 unless given."),
    "kinds": _text("What may go: neurons, heads, experts, vocabulary, attention, mlp, layers."),
    "vocabulary": _text("whole, or domain: the tokens that the domain does not use go first."),
    "vocabulary_threshold": _text(
        "How often a token has to come up in the text to stay; auto: as a joint budget buys.",
        metavar="NUMBER|auto",
    ),
    "sparsity": _text("Share to remove: 0.5 (the default), or e.g. neurons=0.5,heads=0.2."),
    "target_params": _text("Parameters to keep instead: 60%, 90M, a number, or several: 80%,60%."),
    "target_size": _text("Bytes of weights to keep: 200MB, 1.5GiB, 60%."),
    "target_flops": _text("Operations of a token to keep: 60%, 180M."),
    "target_kv_cache": _text("Bytes of a token in the cache to keep: 50%, 12kB."),
    "query_heads": _whole("Query heads that stay of each key/value head; the others go first."),
    "channels": _whole("Channels of the residual stream that stay; the others go first."),
    "keep_layers": _whole("Layers that stay at least, with --kinds layers."),
    "allocation": _text("uniform (same in every layer), global, or joint (over all kinds)."),
    "layout": _text("auto, or padded: uneven layers filled with zeros, for stock transformers."),
    "multiple": _whole("Widths are multiples of it."),
    "refit": _switch("Repair what is left.", "--refit/--no-refit"),
    "refit_tokens": _tokens("Tokens to refit on; as many as are scored."),
    "damping": _number("How strongly refit stays put."),
    "method": _text("oneshot (remove by score) or lasso (draw to zero by training first)."),
    "lasso_tokens": _tokens("Tokens to train on with the lasso."),
    "lasso_lr": _number("Learning rate of the lasso."),
    "penalty": _text("group_lasso, l_half_of_l2, hoyer or l1."),
    "step": _text("proximal (exact zeros) or gradient (the paper's)."),
    "control": _text("What sets the strength: target, timetable, loss or fixed."),
    "strength": _number("The strength, where it is fixed, or begins (loss)."),
    "weights": _text("How hard each unit is drawn: scores, size or one."),
    "fill": _switch("Choose by score what the lasso left above the target.", "--fill/--no-fill"),
    "recover_tokens": _tokens("Tokens to train on after the removal, e.g. 200k."),
    "recover_method": _text("full or lora."),
    "lora_rank": _whole("Rank of LoRA."),
    "lr": _number("Learning rate of the recovery."),
    "distill": _text("Learn from the whole model too: none, teacher (in memory), cached (disk)."),
    "teacher": _text("The model to learn from; the whole model unless given."),
    "temperature": _number("Temperature of the distillation."),
    "mix": _number("From 0 (learn from text alone) to 1 (from the teacher alone)."),
    "top_k": _whole("Likeliest tokens that are kept of a cached teacher."),
    "schedule": _text("Learning rate after the warm-up: cosine or constant."),
    "warmup": _number("Share of the steps over which the learning rate rises."),
    "accumulation": _whole("Batches to an optimizer step."),
    "clip": _number("Greatest norm of the gradient."),
    "weight_decay": _number("Weight decay of AdamW."),
    "checkpointing": _switch(
        "Compute activations twice to save memory.", "--checkpointing/--no-checkpointing"
    ),
    "sharded": _switch("Spread the weights over all processes (FSDP2).", "--sharded/--no-sharded"),
    "validation_tokens": _tokens("Tokens, apart from the training text, that choose weights."),
    "evaluate_every": _whole("Steps between two validations."),
    "save_every_minutes": _number("Minutes between two states on disk."),
    "trackers": _text("Where to log to: tensorboard (where installed), wandb, …"),
    "held_out_tokens": _tokens("Tokens to measure on."),
    "speed": _switch("Measure tokens/s.", "--speed/--no-speed"),
    "samples": _whole("Completions to show."),
    "report": _switch("Draw report.html.", "--report/--no-report"),
    "seed": _whole("Seed of every choice."),
    "device": _text("auto, cpu, mps, cuda or cuda:N."),
    "dtype": _text("float32, bfloat16, float16."),
}
for _name in NAMES:
    OPTIONS[_name].__metadata__[0].autocompletion = completed(_name)

SOURCE = ("model", "domain")
TEXT = ("glob", "text_column", "project_column", "max_documents", "length", "batch_size")
ORIGIN = ("revision", "trust_remote_code")
SCORING = ("criterion", "calibration_tokens", "kinds", "forget", "forget_weight")
SIZE = (
    "sparsity", "target_params", "target_size", "target_flops", "target_kv_cache", "keep_layers",
    "query_heads", "channels", "allocation", "layout", "multiple", "vocabulary",
    "vocabulary_threshold",
)  # fmt: skip
REFIT = ("refit", "refit_tokens", "damping")
LASSO = ("lasso_tokens", "lasso_lr", "penalty", "step", "control", "strength", "weights")
RECOVERY = ("recover_method", "lora_rank", "lr")
TRAINING = (
    "distill", "teacher", "temperature", "mix", "top_k", "schedule", "warmup", "accumulation",
    "clip", "weight_decay", "checkpointing", "sharded", "validation_tokens", "evaluate_every",
    "save_every_minutes", "trackers",
)  # fmt: skip
MEASUREMENT = ("held_out_tokens", "speed")
SHOWN = ("samples", "report")
MACHINE = ("seed", "device", "dtype")


def taking(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of these settings; it gets their values as `given`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        plain = inspect.Parameter.KEYWORD_ONLY
        added = [
            inspect.Parameter(name, plain, default=None, annotation=OPTIONS[name])
            for name in names
        ]
        kept = [p.replace(kind=plain) for p in own.parameters.values() if p.name != "given"]
        # Settings stand first in --help, after what is named without a flag.
        first = [p for p in kept if p.default is inspect.Parameter.empty]
        last = [p for p in kept if p.default is not inspect.Parameter.empty]

        @wraps(command)
        def run(**values: Any) -> None:
            given = {name: values.pop(name) for name in names}
            command(**values, given=given)

        run.__signature__ = own.replace(parameters=[*first, *added, *last])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*first, *added, *last)}
        return run

    return decorate


def settled(
    file: Path | None, given: Given, spell: Callable[[str], str] = lambda name: flag(name)
) -> "Recipe":
    """The recipe of `file` with the flags that were given laid over it."""
    from . import recipe
    from .scores import CRITERIA

    return recipe.load(file, given, criteria=CRITERIA, spell=spell)


def line_of(context: typer.Context) -> str:
    """The command as it was typed."""
    return shlex.join(["llm-narrow", *context.obj])


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def told_on(quiet: bool) -> "Console":
    """Where everything but the result goes."""
    from rich.console import Console
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        console.width = max(console.width, LEAST)
    return console


def answer(json: bool, facts: Mapping[str, object], tables: "RenderableType") -> None:
    """Print the result, as JSON or as tables; of several processes only the first does."""
    from .processes import first

    if not first():
        return
    if json:
        print(json_text.dumps(facts, indent=2, default=str))
    else:
        from rich.console import Console

        console = Console()
        # In a pipe or a file no line ends at 80, and names would be cut for grep. In a terminal
        # narrower than LEAST rich leaves columns out; lines that go on below say all.
        piped = not console.is_terminal and "COLUMNS" not in os.environ
        console.width = PIPED if piped else max(console.width, LEAST)
        console.print(tables)
