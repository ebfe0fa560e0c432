"""The report as files and as a page: what it says, what it refuses, and how a browser shows it."""

import csv
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from llm_narrow import page, page_runs, report
from llm_narrow.errors import BadInput
from test_figures import compared, family, full_run, write_compared
from test_report import AFTER, BEFORE, MANIFEST, run_folder

EVIL = (
    "</pre><script>window.hacked = true</script><img src=x onerror='window.hacked = true'>"
    "{{ 7 * 7 }} &amp; \x1b[31m\x00 \ud800 \u202e end"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Outline(HTMLParser):
    """The tags of a page, what they refer to, and those that were not closed."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attributes if k in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, page.Written]:
    """One run, with a completion that means harm, and a comparison."""
    place = tmp_path_factory.mktemp("reports")
    run = full_run(place / "run", layers=4, units=96)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["samples"] = [{"prompt": EVIL, "before": "\n    return a", "after": EVIL}]
    (run / "manifest.json").write_text(json.dumps(manifest))
    runs = family(place / "family")
    return {
        "run": page.write([run], place / "one"),
        "comparison": page.write(runs, place / "several"),
    }


@pytest.mark.parametrize("name", ["run", "comparison"])
def test_the_page_needs_nothing_but_itself(reports: dict[str, page.Written], name: str) -> None:
    text = reports[name].html.read_text(encoding="utf-8")
    outline = Outline(text)
    assert outline.wrong == [] and outline.open == []
    assert all(link.startswith(("#", "data:")) for link in outline.links)
    assert "@import" not in text and "url(http" not in text
    assert outline.tags.count("h1") == 1
    figures = outline.tags.count("figure")
    assert figures == text.count('role="img" aria-label="') == len(reports[name].figures) / 2
    assert outline.tags.count("table") == outline.tags.count("caption") > 0


def test_what_is_written(reports: dict[str, page.Written]) -> None:
    for written in reports.values():
        folder = written.html.parent
        held = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        files = {written.html, written.md, written.csv, *written.figures}
        assert held == {f.relative_to(folder).as_posix() for f in files}
        assert {f.suffix for f in written.figures} == {".png", ".svg"}
        assert written.bytes == sum(f.stat().st_size for f in files) < 3_000_000
        assert written.warnings == ()


def test_the_headline_of_a_run(reports: dict[str, page.Written]) -> None:
    text = Outline(reports["run"].html.read_text(encoding="utf-8")).text
    assert "smollm2-135m narrowed to python" in text
    for told in ("loss above the whole model +0.397 nats [0.381, 0.414]",
                 "parameters 94.7 M 70.4 % of 135 M", "prefill speed 1.45×",  # noqa: RUF001
                 "decode speed 1.40×", "NOT RECOVERED: this model was not trained",  # noqa: RUF001
                 "50.0 % of its 384 neurons", "94,698,048 (70.4 %)",
                 MANIFEST["command"], "c" * 64):  # fmt: skip
        assert told in text, told
    md = report.markdown(reports["run"].html.parent.parent / "run")
    assert reports["run"].md.read_bytes() == md.encode("utf-8", "replace")


def test_the_headline_of_a_comparison(reports: dict[str, page.Written]) -> None:
    text = Outline(reports["comparison"].html.read_text(encoding="utf-8")).text
    md = reports["comparison"].md.read_text(encoding="utf-8")
    for told in ("24 runs: 4 methods at 3 sizes, 2 seeds", "lasso, at every size",
                 "tokens needed for the best loss of distilled", "needs none"):  # fmt: skip
        assert told in text, told
    assert "| lasso | 70% | 0 | 94,160,506 | 2.550 [2.500, 2.600] |" in md
    assert "![" in md and "figures/frontier.png" in md
    assert (reports["comparison"].html.parent / "figures" / "frontier.png").is_file()


def test_completions_are_text(reports: dict[str, page.Written]) -> None:
    text = reports["run"].html.read_text(encoding="utf-8")
    assert "window.hacked" in text and "<script>window" not in text and "<img" not in text
    assert "{{ 7 * 7 }} &amp;amp; \u241b[31m\u2400 ? \u202e end" in text


def test_rows_of_all_runs_in_one_file(reports: dict[str, page.Written]) -> None:
    with reports["comparison"].csv.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 48
    after = [line for line in lines if line["run"] == "distilled-50-1" and line["label"] == "after"]
    (line,) = after
    assert (line["method"], line["size"], line["seed"], line["lr"]) == (
        "distilled", "50%", "1", "0.001",
    )  # fmt: skip
    assert (line["trained_tokens"], line["tokens"]) == ("102400", "65536")
    assert float(line["loss_low"]) == pytest.approx(float(line["loss"]) - 0.05)
    assert line["seconds"] == "41.0"


@pytest.mark.parametrize("key", [k for k in MANIFEST if k not in ("created", "versions")])
def test_no_key_of_the_manifest_is_needed(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page.figures, "draw", lambda run: ([], []))  # test_figures has those
    for number, value in enumerate(["missing", None, {}, "surprise", 7]):
        manifest = {k: v for k, v in MANIFEST.items() if k != key}
        if value != "missing":
            manifest[key] = value
        run = run_folder(tmp_path / str(number), manifest)
        text = page.write([run], tmp_path / "out").html.read_text(encoding="utf-8")
        assert "94,698,048" in text


def test_a_run_without_rows_says_so(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    text = Outline(page.write([tmp_path], tmp_path).html.read_text(encoding="utf-8")).text
    assert "Not measured." in text and "A model narrowed to a domain" in text


def test_unfinished_runs_are_named_and_skipped_or_refused(tmp_path: Path) -> None:
    good = family(tmp_path / "runs", seeds=(0,))[:2]
    (tmp_path / "half").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "manifest.json").write_text("{}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    bad = [tmp_path / name for name in ("half", "gone", "empty", "broken")]
    written = page.write([*good, *bad], tmp_path / "out")
    text = Outline(written.html.read_text(encoding="utf-8")).text
    assert len(written.warnings) == 4
    reasons = ("manifest.json: the run was not finished", "no such folder",
               "nothing of it was measured", "not readable JSON")  # fmt: skip
    for path, why in zip(bad, reasons, strict=True):
        (told,) = [w for w in written.warnings if str(path) in w]
        assert why in told and told in text
        with pytest.raises(BadInput, match=why):
            page.write([*good, path], tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()
    with pytest.raises(BadInput, match="2 problems"):
        page.write(bad[:2], tmp_path / "none")
    with pytest.raises(BadInput, match="no such folder"):
        page.write([tmp_path / "gone"], tmp_path / "none")
    with pytest.raises(BadInput, match="no run"):
        page.write([], tmp_path / "none")


def test_other_domains_and_vocabularies_need_bits_per_byte(tmp_path: Path) -> None:
    python, rust, other = (
        write_compared(tmp_path / name, name, "50%", 0, loss=2.5, steps=10, **changes)
        for name, changes in (
            ("a", {}),
            ("b", {"domain": "rust"}),
            ("c", {"manifest": {"vocabulary": "32000 tokens"}}),
        )
    )
    known = write_compared(
        tmp_path / "d", "d", "50%", 0, loss=2.5, steps=10, manifest={"vocabulary": "49152 tokens"}
    )
    for pair, why in (((python, rust), "domains differ: python, rust"),
                      ((other, known), "vocabularies differ")):  # fmt: skip
        whole = compared(pair)
        assert whole.metric == "bits_per_byte" and not whole.curves
        assert why in whole.warnings[0].lower()
        file = pair[1] / "rows.jsonl"
        kept = file.read_text()
        lines = [json.loads(line) | {"bits_per_byte": None} for line in kept.splitlines()]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(BadInput, match=f"{why}.* lack bits per byte"):
            page.write(pair, tmp_path / "out")
        file.write_text(kept)
    same = compared([python, write_compared(tmp_path / "e", "e", "50%", 0, loss=2.7, steps=10)])
    assert same.metric == "loss" and same.warnings == ()


def test_a_single_run_without_bits_per_byte_is_refused(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    lines = [json.loads(line) | {"bits_per_byte": None}
             for line in (run / "rows.jsonl").read_text().splitlines()]  # fmt: skip
    (run / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(BadInput, match=r"rows\.jsonl, row 1 has no bits_per_byte"):
        page.write([run], tmp_path / "out")


def test_folders_name_runs_that_say_nothing_of_themselves(tmp_path: Path) -> None:
    paths = [tmp_path / "x" / "run", tmp_path / "y" / "run"]
    for number, path in enumerate(paths):
        path.parent.mkdir()
        run_folder(path, measured=(BEFORE, replace(AFTER, parameters=9_000_000 + number)))
    assert page_runs.labels(paths) == ["x/run", "y/run"]
    text = Outline(page.write(paths, tmp_path / "out").html.read_text(encoding="utf-8")).text
    assert "x/run" in text and "y/run" in text and "9,000,001" in text
    assert page_runs.labels([paths[0]]) == ["run"]


def test_old_figures_go_and_other_files_stay(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", layers=1, units=8, kept=4)
    page.write([run], run)
    (run / "figures" / "mine.png").write_bytes(b"mine")
    (run / "norms.safetensors").unlink()
    page.write([run], run)
    left = {p.name for p in (run / "figures").iterdir()}
    assert "mine.png" in left and "widths.svg" in left and "norms.svg" not in left
    assert (run / "manifest.json").is_file()


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    save_file({"before: a.mlp": np.ones(9), "after: a.mlp": np.arange(9.0)},
              run / "norms.safetensors")  # fmt: skip
    first, second = (page.write([run], tmp_path / name) for name in ("a", "b"))
    assert first.html.read_bytes() == second.html.read_bytes()
    assert [f.read_bytes() for f in first.figures] == [f.read_bytes() for f in second.figures]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="file cannot be written"):
        page.write([run], tmp_path / "file")


def test_a_folder_of_runs_is_all_of_them(tmp_path: Path, run: Any) -> None:
    (tmp_path / "all").mkdir()
    for method in ("oneshot", "scratch"):
        write_compared(tmp_path / "all" / method, method, "50%", 0, loss=2.5)
    done = run("report", tmp_path / "all", "--json")
    assert done.code == 0, done.err
    assert "Reporting 2 runs" in done.err
    text = (tmp_path / "all" / "report.md").read_text(encoding="utf-8")
    assert "| oneshot | 50% | 0 |" in text and "| scratch | 50% | 0 |" in text
    (tmp_path / "none").mkdir()
    assert run("report", tmp_path / "none").code == 2


def test_two_hundred_runs_take_seconds(tmp_path: Path) -> None:
    """Processor time, since the machine may have other work; 5 s and 3 MB are promised."""
    curve = write_compared(tmp_path / "curve", "m", "50%", 0, loss=2.5, steps=1000) / "train.jsonl"
    paths = []
    for number in range(200):
        method, rest = divmod(number, 25)
        size, seed = divmod(rest, 5)
        paths.append(write_compared(
            tmp_path / str(number), f"method {method}", f"{80 - 15 * size}%", seed,
            loss=2.5 + 0.1 * method + 0.1 * size + 0.02 * seed, steps=1,
        ))  # fmt: skip
        shutil.copyfile(curve, paths[-1] / "train.jsonl")
    began = time.process_time()
    written = page.write(paths, tmp_path / "out")
    taken = time.process_time() - began
    assert taken < 5, taken
    assert written.bytes < 3_000_000
    assert written.html.read_text(encoding="utf-8").count('<tr><th scope="row" data-value') == 200


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; the tests that need it are skipped where there is none."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next((where for name in BROWSERS if (where := shutil.which(name))), None)
    with sync.sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except sync.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.mark.parametrize("name", ["run", "comparison"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(
    browser: Any, reports: dict[str, page.Written], name: str, width: int, scheme: str
) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda r: said.append(r.url) if r.url.startswith("http") else None)
    tab.goto(reports[name].html.as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    sticking_out = tab.evaluate(
        "[...document.querySelectorAll('body :not(svg *)')].filter(e => {"
        "  const r = e.getBoundingClientRect(); return r.right > innerWidth + 1 || r.left < -1; })"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert sticking_out == []
    # Ink on paper and every colour of a figure have to be told from the ground they stand on.
    light = tab.evaluate(
        "c => c.map(n => { const p = document.createElement('p'); p.style.color = `var(--${n})`;"
        "  document.body.append(p); const [r, g, b] = getComputedStyle(p).color.match(/[\\d.]+/g)"
        "    .map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);"
        "  p.remove(); return .2126 * r + .7152 * g + .0722 * b; })",
        list(page.PALETTE),
    )
    shade = dict(zip(page.PALETTE, light, strict=True))
    assert (shade["paper"] > 0.5) == (scheme == "light")

    def contrast(colour: str) -> float:
        high, low = sorted((shade[colour], shade["paper"]), reverse=True)
        return float((high + 0.05) / (low + 0.05))

    assert contrast("ink") > 12 and contrast("muted") > 4.5 and contrast("alarm") > 4.5
    assert min(contrast(f"s{n}") for n in range(8)) > 4.2 and contrast("accent") > 4.5
    if name == "run":
        shown = tab.locator(".texts pre").nth(1).text_content()
        assert shown.startswith("</pre><script>window.hacked")
        assert tab.evaluate("window.hacked") is None
        images = tab.evaluate(
            "['light', 'dark'].map(c => getComputedStyle(document.querySelector("
            "  `svg image.${c}`)).display != 'none')"
        )
        assert images == [scheme == "light", scheme == "dark"]
    assert said == []
    tab.close()


def test_the_table_sorts_in_a_browser_and_is_whole_without_script(
    browser: Any, reports: dict[str, page.Written]
) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(reports["comparison"].html.as_uri())
    column = "[...document.querySelectorAll('.sortable tbody tr')].map(r => r.cells[4].innerText)"
    before = tab.evaluate(column)
    heading = tab.get_by_role("columnheader", name="loss").last
    heading.get_by_role("button").click()
    up = tab.evaluate(column)
    assert up == sorted(before, key=lambda text: float(text.split()[0])) != before
    assert heading.get_attribute("aria-sort") == "ascending"
    heading.get_by_role("button").click()
    assert tab.evaluate(column)[0] == up[-1]
    tab.close()
    context = browser.new_context(java_script_enabled=False)
    still = context.new_page()
    still.goto(reports["comparison"].html.as_uri())
    assert still.locator(".sortable tbody tr").count() == 24
    assert still.locator("thead button").count() == 0
    context.close()


def test_it_prints_in_light_on_a_few_pages(
    browser: Any, reports: dict[str, page.Written]
) -> None:
    tab = browser.new_page(color_scheme="dark")
    tab.goto(reports["run"].html.as_uri())
    tab.emulate_media(media="print", color_scheme="dark")
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert min(int(part) for part in paper.removeprefix("rgb(").rstrip(")").split(",")) > 240
    assert tab.pdf(format="A4").count(b"/Type /Page\n") < 9
    tab.close()
