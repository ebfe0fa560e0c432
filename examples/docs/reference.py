"""The reference pages, from what the program itself says: commands, recipe, Python names."""

import ast
import inspect
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

import llm_narrow
from llm_narrow import cli, init_schema, options, recipe, sections
from llm_narrow.recipe import FLAGS, Recipe
from llm_narrow.sections import Section

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = "reference/cli/"
MODULES = "reference/modules/"
MADE = "*This page is made from the program as the site is built.*\n\n"
# Shown beside those that the documents import from: where the concepts and tables of choices are.
CORE = ("domains", "families", "penalties", "refit", "scores", "units")
NEEDED = "needed"


def pages() -> dict[str, str]:
    """Every generated page of the reference: its place below docs/ -> its text."""
    made = {f"{COMMANDS}{name}.md": command_page(name) for name in commands()}
    made |= {f"{MODULES}{name}.md": module_page(name) for name in modules()}
    made["reference/recipe.md"] = recipe_page()
    made["reference/recipe.schema.json"] = init_schema.text()
    made["reference/python.md"] = python_page()
    return made


def command_pages() -> list[str]:
    """The pages of the commands, in the order of `llm-narrow --help`."""
    return [f"{COMMANDS}{name}.md" for name in commands()]


def module_pages() -> list[str]:
    """The pages of the modules, by name."""
    return [f"{MODULES}{name}.md" for name in modules()]


# Commands ------------------------------------------------------------------------------------


@cache
def commands() -> dict[str, Any]:
    """The commands by name."""
    group: Any = typer.main.get_command(cli.app)
    return dict(group.commands)


def command_page(name: str) -> str:
    """A command: its line, its words, a table of what it takes."""
    command = commands()[name]
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join(["llm-narrow", name, *command.collect_usage_pieces(context)])
    taken = [p for p in command.params if p.name != "help"]
    words = [p for p in taken if not p.opts[0].startswith("-")]
    flags = [p for p in taken if p.opts[0].startswith("-")]
    lines = [f"# {name}\n", f"{command.help}\n", f"```text\n{usage}\n```\n"]
    if words:
        rows = [(f"`{p.name}`", cell(p.help), "" if p.required else "may be left out")
                for p in words]  # fmt: skip
        lines.append(table(("argument", "", ""), rows))
    with_recipe = any(p.name == "recipe" for p in taken)
    if with_recipe:
        lines.append(
            "What a flag does not say is taken from the recipe; where that says nothing either, it "
            "is the default that stands with the setting ([all settings](../recipe.md)).\n"
        )
    columns = ("flag", "what it is", *(("setting",) if with_recipe else ()))
    rows = [
        (spelled(p), cell(p.help) + unless(p, with_recipe), setting_of(p.name, with_recipe))
        for p in flags
    ]
    return "\n".join([*lines, table(columns, [row[: len(columns)] for row in rows]), "", MADE])


def spelled(option: Any) -> str:
    """`--json`, `-q` or `--refit` / `--no-refit`, each as code."""
    return " / ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))


def unless(option: Any, with_recipe: bool) -> str:
    """What holds where a flag is not given; nothing for switches, and for settings of a recipe."""
    if option.required:
        return f" *{NEEDED.capitalize()}.*"
    if option.default in (None, False, "") or (with_recipe and option.name in FLAGS):
        return ""
    given = "yes" if option.default is True else option.default
    return f" *Unless given:* `{given}`."


def setting_of(name: str, with_recipe: bool) -> str:
    """The setting that a flag stands for, as a link; nothing for what is about one call."""
    if not with_recipe or name not in FLAGS:
        return ""
    section, _, _ = FLAGS[name].rpartition(".")
    return f"[`{FLAGS[name]}`](../recipe.md#{section or 'at-the-top'})"


# Recipe --------------------------------------------------------------------------------------


def recipe_page() -> str:
    """Every field of a recipe, section by section, and the rules between fields."""
    lines = [
        "# Every field of a recipe\n",
        "What the settings are for is told in [Recipes and flags](../recipes.md); here stands "
        "every field with its default and the rule that its value has to obey. Editors that read "
        "JSON schemas can complete and check a recipe with [recipe.schema.json]"
        "(recipe.schema.json).\n",
    ]
    for name, field in Recipe.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            lines += [f"## {name}\n", f"{inner.__doc__}\n", fields(inner, f"{name}.")]
    lines += ["## At the top\n", fields(Recipe, "")]
    lines += [
        "## Rules between fields\n",
        "A recipe that breaks one is refused with its words; `…` stands for the value given.\n",
        *(f"- {rule}" for rule in rules()),
        "",
    ]
    return "\n".join([*lines, MADE])


def fields(section: type[Section], prefix: str) -> str:
    """The table of the fields of a section that are no sections themselves."""
    flag_of = {dotted: name for name, dotted in FLAGS.items()}
    rows = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            continue
        flag = flag_of[f"{prefix}{name}"]
        words = next(m.help for m in options.OPTIONS[flag].__metadata__ if hasattr(m, "help"))
        spelled_so = f"`{options.flag(flag)}`"
        rows.append((f"`{prefix}{name}`", standing(field), rule(field), cell(words), spelled_so))
    return table(("field", "default", "rule", "what it is", "flag"), rows)


def standing(field: FieldInfo) -> str:
    """The default of a field, as YAML has it."""
    if field.is_required():
        return NEEDED
    return "none" if field.default is None else f"`{json.dumps(field.default)}`"


def rule(field: FieldInfo) -> str:
    """What a value has to be: the choices, or the words that a wrong value is told."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(field.annotation))
    return cell(field.description)


def rules() -> Iterator[str]:
    """The rules between fields, as their checks tell them."""
    for module in (sections, recipe):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ValueError":
                yield cell(template(node.args[0]))


def template(node: ast.expr) -> str:
    """The text of a literal, with `…` where a value is put in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else "…"


# Python --------------------------------------------------------------------------------------


def python_page() -> str:
    """The public names of the package."""
    lines = [
        "# Python\n",
        "Everything that `import llm_narrow` offers. Keywords of `prune`, `score`, `bench`, "
        "`compare` and `recover` beside those shown are the [settings](recipe.md) by the names of "
        "their flags: `sparsity=0.5`, `target_params=\"60%\"`. The modules stand apart, each on a "
        "page of its own.\n",
    ]  # fmt: skip
    home = {name: module for module, names in llm_narrow._HOMES.items() for name in names}
    lines += [f"::: llm_narrow.{home[n]}.{n}\n" for n in llm_narrow.__all__ if n in home]
    return "\n".join(lines)


def modules() -> list[str]:
    """The modules with a page: those that documents import from, and the core, by name."""
    texts = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = set(CORE)
    for text in (file.read_text("utf-8") for file in texts):
        found |= set(re.findall(r"^from llm_narrow\.(\w+) import", text, re.MULTILINE))
        for line in re.findall(r"^from llm_narrow import (.+)$", text, re.MULTILINE):
            found |= {name.partition(" as ")[0].strip() for name in line.split(",")}
    return sorted(n for n in found if (ROOT / f"src/llm_narrow/{n}.py").is_file())


def module_page(name: str) -> str:
    """What a module has to offer."""
    return (
        f"---\ntitle: {name}\n---\n\n::: llm_narrow.{name}\n    options:\n      heading_level: 1\n"
    )


# Tables --------------------------------------------------------------------------------------


def cell(text: str | None) -> str:
    """Text that may stand in a table and means what it says."""
    return re.sub(r"([|<*_])", r"\\\1", text or "")


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
