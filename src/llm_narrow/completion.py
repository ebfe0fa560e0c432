"""Completion in shells: of names that flags take, and the scripts that ask for it.

Runs at every Tab, so it imports nothing heavy: the names stand here once more, and a test holds
them to the tables that they are from.
"""

from collections.abc import Callable
from typing import Annotated

import typer
from typer.completion import (  # type: ignore[attr-defined]
    completion_init,
    get_completion_script,
    install,
)

from .errors import UnknownName

VARIABLE = "_LLM_NARROW_COMPLETE"  # by which a shell asks
SHELLS = ("bash", "fish", "powershell", "zsh")
NAMES: dict[str, tuple[str, ...]] = {
    "model": (
        "smollm2-135m", "smollm2-135m-hub", "smollm2-360m", "smollm2-1.7b", "pythia-14m",
        "pythia-31m", "pythia-70m", "pythia-160m", "pythia-410m", "pythia-1b", "pythia-1.4b",
        "pythia-2.8b", "pythia-6.9b", "pythia-12b", "llama-3.2-1b", "llama-3.2-3b",
        "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "qwen2.5-coder-3b", "qwen2.5-coder-7b",
        "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b",
    ),
    "domain": ("python", "python-stdlib", "python-github", "english"),
    "forget": ("python", "python-stdlib", "python-github", "english"),
    "criterion": ("ablation", "activation", "attribution", "fisher", "magnitude", "paper",
                  "random", "surgeon", "wanda"),
    "kinds": ("neurons", "heads", "experts", "vocabulary", "attention", "mlp", "layers"),
    "vocabulary": ("whole", "domain"),
    "allocation": ("uniform", "global", "joint"),
    "layout": ("auto", "padded"),
    "method": ("oneshot", "lasso"),
    "penalty": ("group_lasso", "l_half_of_l2", "hoyer", "l1"),
    "step": ("proximal", "gradient"),
    "control": ("target", "timetable", "loss", "fixed"),
    "weights": ("scores", "size", "one"),
    "recover_method": ("full", "lora"),
    "distill": ("none", "teacher", "cached"),
    "schedule": ("cosine", "constant"),
    "dtype": ("float32", "bfloat16", "float16"),
}  # fmt: skip


def prepare() -> None:
    """Have shells that ask answered. Typer would with flags of its own, which guess the shell."""
    completion_init()


def completed(name: str) -> Callable[[str], list[str]]:
    """What the flag of a setting may go on with; lists are completed after each comma."""

    def complete(incomplete: str) -> list[str]:
        begun, comma, last = incomplete.rpartition(",")
        return [f"{begun}{comma}{one}" for one in NAMES[name] if one.startswith(last)]

    return complete


def _show(shell: str | None) -> None:
    if shell:
        _check(shell)
        print(get_completion_script(prog_name="llm-narrow", complete_var=VARIABLE, shell=shell))
        raise typer.Exit()


def _install(shell: str | None) -> None:
    if shell:
        _check(shell)
        _, path = install(shell=shell, prog_name="llm-narrow", complete_var=VARIABLE)
        print(f"Written to {path}. It works in shells that are opened from now on.")
        raise typer.Exit()


def _check(shell: str) -> None:
    """Raise UnknownName for a shell without completion."""
    if shell not in SHELLS:
        raise UnknownName("Shell", shell, SHELLS)


Show = Annotated[
    str | None,
    typer.Option("--show-completion", callback=_show, is_eager=True, metavar="SHELL",
                 help="Print what has bash, zsh, fish or powershell complete our names."),
]  # fmt: skip
Install = Annotated[
    str | None,
    typer.Option("--install-completion", callback=_install, is_eager=True, metavar="SHELL",
                 help="Put it where the shell reads it when it starts."),
]  # fmt: skip
