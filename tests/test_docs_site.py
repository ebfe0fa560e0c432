"""The documents: every block of code is checked, the reference says what is there, no link is dead.

A command is parsed by the program itself, and its settings are read as a run would read them. A
block that cannot be checked so says why in a comment before it: `<!-- not run: … -->`.
"""

import ast
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
import typer
import yaml

import llm_narrow
from llm_narrow import cli, domains, families, init_schema, recipe
from llm_narrow.recipe import FLAGS, Recipe
from llm_narrow.scores import CRITERIA, score
from tiny import batch, tiny

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Not the tables that benchmarks and runs have written.
WRITTEN = [p for p in sorted(DOCS.rglob("*.md")) if p.parent.name not in ("bench", "compared")]
PAGES = [ROOT / "README.md", *WRITTEN]
FENCE = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+?) -->\n)?"
    r"^(?P<mark>```+)(?P<language>\w*)\n(?P<text>.*?)^(?P=mark)$",
    re.DOTALL | re.MULTILINE,
)
SHELL = ("sh", "bash")
# Blocks that are no whole program; the tests named run them where they belong.
PIECES = {"docs/adding-an-architecture.md": "test_laws.py"}
# Flags that pages name and that are of other programs.
FOREIGN = {"--help", "--mixed_precision"}
WHOLE: Any = typer.main.get_command(cli.app)
COMMANDS: dict[str, Any] = WHOLE.commands
PARAMS = [p for command in (WHOLE, *COMMANDS.values()) for p in command.params]
OPTIONS = {*(flag for p in PARAMS for flag in (*p.opts, *p.secondary_opts))}


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str
    why_not: str | None

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0][:60] if self.text else ''}"


def blocks(page: Path) -> list[Block]:
    found = []
    for m in FENCE.finditer(page.read_text("utf-8")):
        first = m["text"].split(maxsplit=1)[:1]
        shell = not m["language"] and first and first[0] in ("llm-narrow", "pytest", "python")
        language = "sh" if shell else m["language"]
        found.append(Block(page.relative_to(ROOT).as_posix(), language, m["text"], m["why"]))
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(*languages: str) -> list[Any]:
    return [pytest.param(b, id=str(b)) for b in BLOCKS if b.language in languages]


def test_every_block_says_what_it_is_in() -> None:
    assert {b.language for b in BLOCKS} <= {*SHELL, "python", "yaml", "json", "text", "bibtex"}
    assert len([b for b in BLOCKS if b.language in SHELL]) > 60


# Commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", of(*SHELL))
def test_commands_are_those_of_the_program(block: Block, tmp_path: Path) -> None:
    whole = ""
    for line in block.text.replace("\\\n", " ").splitlines():
        whole += line
        try:
            words = shlex.split(whole, comments=True)
        except ValueError:  # a quote goes on in the next line
            whole += "\n"
            continue
        if words:
            check_line(block, words, tmp_path)
        whole = ""
    assert not whole


def check_line(block: Block, words: list[str], tmp_path: Path) -> None:
    line = shlex.join(words)
    words = words[: next((n for n, word in enumerate(words) if word in (">", "|")), len(words))]
    program, rest = words[0], words[1:]
    if program in ("torchrun", "accelerate"):
        assert "llm_narrow" in rest, line
        program, rest = "llm-narrow", rest[rest.index("llm_narrow") + 1 :]
    if program == "llm-narrow":
        check_command(block, rest, tmp_path)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {*rest} <= {*targets}, line
    elif program == "python" and rest[0] == "-c":
        check_python(Block(block.page, "python", rest[1], None))
    elif program == "python" and rest[0].endswith(".py"):
        assert (ROOT / rest[0]).is_file(), line
        given = {w.partition("=")[0] for w in before_own(rest) if w.startswith("--")}
        assert given <= flags_of_scripts(), line
    elif program == "sbatch":
        assert any((ROOT / word).is_file() for word in rest if word.endswith(".sh")), line
    elif program == "pytest" or rest[:2] == ["-m", "pytest"]:
        files = [word for word in rest if word.endswith(".py")]
        assert files and all((ROOT / word).is_file() for word in files), line
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = {e for w in rest for e in re.findall(r"\[([\w,-]+)\]", w)}
        named = {name for extra in extras for name in extra.split(",")}
        assert named <= {*project["optional-dependencies"]}, line
    else:
        known = program in (".", "cd") or rest[:2] == ["-m", "venv"]
        assert known or block.why_not, f"{block.page}: nothing here checks {line!r}"


@cache
def flags_of_scripts() -> set[str]:
    """The flags of the scripts in examples/, as they stand there or made of names."""
    found = set()
    shared = ROOT / "src/llm_narrow/paper_toys.py"  # by the examples of toys
    for script in [*(ROOT / "examples").rglob("*.py"), shared]:
        text = script.read_text("utf-8")
        found |= set(re.findall(r'"(--[a-z][\w-]*)', text))
        if 'add_argument(f"--{' in text:
            found |= {f"--{name}" for name in re.findall(r'"([a-z][\w-]*)"', text)}
    return found


def before_own(words: list[str]) -> list[str]:
    """The words up to `--`, after which come those of another program."""
    return words[: words.index("--")] if "--" in words else words


def check_command(block: Block, words: list[str], tmp_path: Path) -> None:
    """Parse it, and read its settings as the command would."""
    name, rest = words[0], words[1:]
    if name.startswith("--"):  # of the program, which ends then
        assert name in OPTIONS, name
        return
    taken = COMMANDS[name].make_context(name, list(rest)).params
    given = {key: taken[key] for key in FLAGS if taken.get(key) is not None}
    if name not in ("prune", "regularize", "score", "recover", "compare") or taken.get("source"):
        return
    if name in ("recover", "compare"):
        given = {"domain": "that of the run", **given, "recover_tokens": taken["tokens"]}
    file = taken.get("recipe")
    if file is not None and not (ROOT / file).is_file():  # one that the page itself shows
        shown = [b.text for b in blocks(ROOT / block.page) if b.language == "yaml"]
        assert shown, f"{block.page}: no recipe {file} is here or in recipes/"
        file = tmp_path / "shown.yaml"
        file.write_text(shown[0])
    elif file is not None:
        file = ROOT / file
    sizes = str(given.get("target_params") or "").split(",")
    for size in sizes:
        recipe.load(file, {**given, "target_params": size.strip() or None}, criteria=CRITERIA)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_flag_is_dead(page: Path) -> None:
    prose = FENCE.sub("", page.read_text("utf-8"))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", re.sub(r"<!--.*?-->", "", prose)))
    assert named <= OPTIONS | flags_of_scripts() | FOREIGN


# Other blocks --------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [p for p in of("python") if p.values[0].page not in PIECES])
def test_python_compiles_and_its_imports_are_there(block: Block) -> None:
    check_python(block)


def check_python(block: Block) -> None:
    tree = ast.parse(block.text)
    compile(tree, block.page, "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llm_narrow"):
            module = importlib.import_module(str(node.module))
            for name in (alias.name for alias in node.names):
                if not hasattr(module, name):
                    importlib.import_module(f"{node.module}.{name}")
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "llm_narrow":
            assert node.attr in llm_narrow.__all__
        elif isinstance(node, ast.Call) and "llm_narrow." in ast.unparse(node.func):
            function = getattr(llm_narrow, ast.unparse(node.func).removeprefix("llm_narrow."))
            own = inspect.signature(function).parameters
            assert {k.arg for k in node.keywords} <= {*own, *FLAGS}


@pytest.mark.parametrize("block", of("yaml"))
def test_recipes_in_pages_are_recipes(block: Block, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(block.text)
    assert recipe.load(tmp_path / "r.yaml", criteria=CRITERIA).model.name


@pytest.mark.parametrize("block", of("json"))
def test_rows_in_pages_are_json(block: Block) -> None:
    for line in block.text.splitlines():
        assert isinstance(json.loads(line), dict)


def python_of(page: str, number: int = 0) -> str:
    return [b.text for b in blocks(DOCS / page) if b.language == "python"][number]


def test_the_criterion_of_the_page_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*CRITERIA]:
        monkeypatch.setitem(CRITERIA, name, CRITERIA[name])
    monkeypatch.setitem(CRITERIA, "peak", CRITERIA["magnitude"])
    exec(python_of("how-to/add-a-criterion.md"), {})
    model = tiny("llama")
    groups = families.find_groups(model)
    tokens = batch("llama")
    found = score(model, groups, [tokens], criterion="peak")
    apart = [score(model, groups, [row[None]], criterion="peak") for row in tokens]
    for g in groups:
        assert found[g.name].shape == (g.size,) and (found[g.name] > 0).all()
        most = torch.stack([one[g.name] for one in apart]).amax(0)
        torch.testing.assert_close(found[g.name], most, rtol=1e-4, atol=1e-6)


def test_the_domain_of_the_page_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/one.md").write_text("something")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(domains.DOMAINS, "notes", domains.DOMAINS["python"])
    exec(python_of("how-to/add-a-domain.md"), {})
    domains.check("notes")
    assert "notes" in domains.DOMAINS["notes"](domains.Asked()).what


def test_the_code_of_the_concepts_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = SimpleNamespace(model=tiny("llama"))
    monkeypatch.setattr("llm_narrow.models.load", lambda name: stand_in)
    exec(python_of("concepts/unit.md"), {})
    told = capsys.readouterr().out.split("\n")
    assert told[0] == "model.layers.0.mlp.gate_proj.weight 0 1"
    assert told[2] == "model.layers.0.mlp.down_proj.weight 1 1"


def test_errors_in_the_questions_are_those_of_the_program() -> None:
    told = [*_messages()]
    quotes = [b.text.strip() for b in blocks(DOCS / "faq.md") if b.language == "text"]
    assert len(quotes) > 15
    for quote in quotes:
        parts = [re.escape(part.strip(" .")) for part in re.split("…", quote) if part.strip(" .")]
        assert any(re.search(".*".join(parts), text, re.DOTALL) for text in told), quote


def _messages() -> Iterator[str]:
    for file in sorted((ROOT / "src/llm_narrow").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                yield _template(node)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UnknownName":
                yield f"{_template(node.args[0])} … is unknown."


def _template(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _template(node.left) + _template(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


# Reference -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> Iterator[dict[str, ModuleType]]:
    """The scripts of examples/docs, imported as mkdocs does: with each other in reach."""
    folder = ROOT / "examples/docs"
    names = ("links", "reference")
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(folder))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(folder))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def test_every_command_and_flag_has_its_place(made: dict[str, ModuleType]) -> None:
    pages = made["reference"].pages()
    for name, command in COMMANDS.items():
        text = pages[f"reference/cli/{name}.md"]
        assert command.help in text
        for p in command.params:
            for flag in (*p.opts, *p.secondary_opts):
                assert p.name == "help" or f"`{flag}`" in text, (name, flag)


def test_every_setting_has_its_line_with_its_default(made: dict[str, ModuleType]) -> None:
    lines = made["reference"].recipe_page().splitlines()
    for flag, dotted in FLAGS.items():
        (line,) = [one for one in lines if one.startswith(f"| `{dotted}` ")]
        assert f"`--{flag.replace('_', '-')}`" in line
    (sparsity,) = [one for one in lines if one.startswith("| `prune.damping` ")]
    assert sparsity.split(" | ")[1:3] == ["`0.01`", "a number above 0"]
    assert any("give either prune.sparsity or prune.…, not both" in line for line in lines)


def test_every_public_name_is_on_the_page_of_python(made: dict[str, ModuleType]) -> None:
    text = made["reference"].python_page()
    for name in {*llm_narrow.__all__} - {"__version__"}:
        (line,) = re.findall(rf"^::: (llm_narrow\.\w+\.{name})$", text, re.MULTILINE)
        home = importlib.import_module(line.rpartition(".")[0])
        assert getattr(home, name) is getattr(llm_narrow, name)


SPELLED = [
    ({}, True),
    ({"score": {"tokens": "200k"}}, True),
    ({"score": {"tokens": "many"}}, False),
    ({"score": {"forget": "english,./letters"}}, True),
    ({"prune": {"kinds": "neurons,heads"}}, True),
    ({"prune": {"kinds": ["vocabulary", "neurons"]}}, True),
    ({"prune": {"kinds": ["neuron"]}}, False),
    ({"prune": {"sparsity": "neurons=0.5,heads=0.2"}}, True),
    ({"prune": {"sparsity": {"neurons": 0.5}}}, True),
    ({"prune": {"sparsity": 1.5}}, False),
    ({"prune": {"sparsity": "half"}}, False),
    ({"prune": {"target_params": "60%"}}, True),
    ({"prune": {"target_params": "sixty"}}, False),
    ({"prune": {"refit": False}}, True),
    ({"prune": {"refit": "later"}}, False),
    ({"prune": {"sparcity": 0.5}}, False),
    ({"train": {"trackers": ["wandb"]}}, True),
    ({"seed": -1}, False),
]


@pytest.mark.parametrize(("settings", "good"), SPELLED, ids=str)
def test_the_schema_takes_what_a_recipe_takes(settings: dict[str, Any], good: bool) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    data = {"model": {"name": "m"}, "domain": {"name": "d"}, **settings}
    assert jsonschema.Draft202012Validator(init_schema.schema()).is_valid(data) is good
    try:
        Recipe.model_validate(data)
    except ValueError:
        assert not good
    else:
        assert good


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_schema_takes_the_recipes_and_what_runs_write(file: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    check = jsonschema.Draft202012Validator(init_schema.schema()).validate
    check(yaml.safe_load(file.read_text()))
    check(yaml.safe_load(recipe.load(file).to_yaml()))


# Links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "link", "turned"),
    [
        ("index.md", "../README.md", "source/README.md"),
        ("vocabulary.md", "../src/x.py", "source/src/x.py.md"),
        ("concepts/unit.md", "../recipes.md#flags", "../recipes.md#flags"),
        ("source/README.md", "docs/results.md", "../results.md"),
        ("source/README.md", "docs/compared/report.html", "../compared/report.page.html"),
        ("results.md", "compared/report.html", "compared/report.page.html"),
        ("index.md", "https://example.org/a.html", "https://example.org/a.html"),
        ("index.md", "../nowhere.md", "../nowhere.md"),
    ],
)
def test_links_out_of_the_documents(
    made: dict[str, ModuleType], tmp_path: Path, page: str, link: str, turned: str
) -> None:
    for name in ("README.md", "src/x.py", "docs/results.md", "docs/recipes.md",
                 "docs/compared/report.html"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    text = "Before [a\nlink]({}) after.\n\n```sh\n[not]({}) one\n```\n"
    found = made["links"].turned(text.format(link, link), page, tmp_path)
    assert found == text.format(turned, link)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a warning ends the build."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


class Parsed(HTMLParser):
    """The ids of a page, where it points to, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of_tag = dict(attrs)
        self.ids |= {str(of_tag[key]) for key in ("id", "name") if of_tag.get(key)}
        if tag == "a" and of_tag.get("href"):
            self.links.append(str(of_tag["href"]))
        elif tag == "link" and of_tag.get("rel") not in ("canonical", "prev", "next", "edit"):
            self.loads.append(str(of_tag.get("href")))
        elif tag in ("script", "img", "iframe", "source") and of_tag.get("src"):
            self.loads.append(str(of_tag["src"]))


@pytest.mark.long
def test_no_link_of_the_site_is_dead(site: Path) -> None:
    pages = {file: Parsed(file.read_text("utf-8")) for file in site.rglob("*.html")}
    assert len(pages) > len(PAGES)
    dead = []
    for file, page in pages.items():
        if file.name == "404.html":  # its links are from the root of a server
            continue
        for link in (*page.links, *page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            there = target.is_file() or (target / "index.html").is_file()
            anchor = unquote(parts.fragment)
            if not there or (anchor and target in pages and anchor not in pages[target].ids):
                dead.append(f"{file.relative_to(site)}: {link}")
    assert not dead


@pytest.mark.long
def test_the_site_loads_nothing_from_the_network(site: Path) -> None:
    for file in site.rglob("*.html"):
        loads = Parsed(file.read_text("utf-8")).loads
        far = [what for what in loads if urlsplit(what).scheme in ("http", "https")]
        assert not far and "//" not in {what[:2] for what in loads}, file
    for file in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", file.read_text("utf-8")), file


@pytest.mark.long
def test_the_search_works_from_the_disk(site: Path) -> None:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((where for name in names if (where := shutil.which(name))), None)
    with sync.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except sync.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "concepts/refit.html").as_uri())
        page.get_by_role("textbox", name="Search").click()
        page.get_by_role("textbox", name="Search").type("selectivity")
        page.wait_for_selector(".md-search-result__item", timeout=60_000)
        shown = page.locator(".md-search-result__link").evaluate_all("all => all.map(a => a.href)")
        assert any("matrix.html" in link for link in shown), shown
        assert {urlsplit(url).scheme for url in asked} <= {"file", "data", "about", "blob"}
        browser.close()


@pytest.mark.long
def test_the_pictures_show_what_is_declared_now(tmp_path: Path) -> None:
    code = "import sys, pathlib, pictures; pictures.draw(pathlib.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT / "examples/docs", capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    drawn = sorted(tmp_path.glob("*.svg"))
    assert [file.name for file in drawn] == sorted(p.name for p in (DOCS / "assets").glob("*.svg"))
    number = re.compile(r"-?\d+(?:\.\d+)?")
    for file in drawn:
        new, old = file.read_text("utf-8"), (DOCS / "assets" / file.name).read_text("utf-8")
        how = f"{file.name}: run python examples/docs/pictures.py"
        assert number.sub("#", new) == number.sub("#", old), how
        pairs = zip(number.findall(new), number.findall(old), strict=True)
        assert all(abs(float(a) - float(b)) < 1 for a, b in pairs), how
