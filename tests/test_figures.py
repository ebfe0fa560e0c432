"""The figures: drawn where there is data, left out where there is none, the same in both themes."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import save_file

from llm_narrow import (
    figure_compare,
    figure_style,
    figure_units,
    figures,
    page_compare,
    page_compared,
    page_runs,
)  # fmt: skip
from llm_narrow.figure_style import PALETTE
from test_report import AFTER, BEFORE, MANIFEST, run_folder

ALL = tuple(figures.FIGURES)


def write_curve(file: Path, *, steps: int, start: float, end: float, **columns: Any) -> None:
    """Lines as the training loop writes them; the loss falls from `start` to `end`."""
    chance = np.random.default_rng(steps)
    lines: list[dict[str, Any]] = [{"step": 0, "tokens": 0, "validation": start}]
    for step in range(1, steps + 1):
        loss = end + (start - end) * math.exp(-4 * step / steps)
        lines.append({
            "step": step, "tokens": step * 1024, "loss": loss + chance.normal(0, 0.06),
            "validation": loss if step % 10 == 0 or step == steps else None,
            "lr": 1e-3, "tokens_per_second": 800.0,
            **{name: value * step / steps for name, value in columns.items()},
        })  # fmt: skip
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def full_run(path: Path, *, layers: int = 4, units: int = 96, kept: int = 48) -> Path:
    """A run folder with everything that a figure could want."""
    chance = np.random.default_rng(0)
    names = {f"model.layers.{i}.mlp": units for i in range(layers)}
    names |= {f"model.layers.{i}.self_attn": 3 for i in range(layers)}
    scores: dict[str, Any] = {}
    keep, norms = {}, {}
    for number, (name, size) in enumerate(names.items()):
        half = np.exp(chance.normal(0.04 * number, 1.4, size)).astype(np.float32)
        other = (half * np.exp(chance.normal(0, 0.3, size))).astype(np.float32)
        scores |= {name: half + other, f"first half: {name}": half, f"second half: {name}": other}
        count = kept if size == units else 2
        keep[name] = np.argsort(np.argsort(-scores[name])) < count
        norms[f"before: {name}"] = np.exp(chance.normal(0, 0.2, size)).astype(np.float32)
        norms[f"after: {name}"] = norms[f"before: {name}"] * keep[name] * np.float32(0.9)
    plan = [
        {"group": name, "kind": "heads" if "attn" in name else "neurons",
         "before": mask.size, "after": int(mask.sum())}
        for name, mask in keep.items()
    ]  # fmt: skip
    # What both halves would keep is not computed from these scores: the figure only tells it.
    stability = {"neurons": 0.913, "heads": 0.97}
    rust = replace(BEFORE.loss, value=3.4, low=3.3, high=3.5)
    other = [replace(r, domain="rust", loss=rust) for r in (BEFORE, AFTER)]
    run_folder(path, {**MANIFEST, "plan": plan, "stability": stability}, (BEFORE, AFTER, *other))
    (path / "model").mkdir(exist_ok=True)
    save_file(scores, path / "scores.safetensors")
    save_file(keep, path / "model" / "keep.safetensors")
    save_file(norms, path / "norms.safetensors")
    write_curve(path / "lasso.jsonl", steps=60, start=2.4, end=2.9, zero=0.5, strength=0.02)
    write_curve(path / "recover.jsonl", steps=120, start=2.9, end=2.6)
    return path


def write_compared(
    path: Path, method: str, size: str, seed: int, *, loss: float, start: float | None = None,
    steps: int = 100, lr: float = 1e-3, manifest: dict[str, Any] | None = None, **changes: Any,
) -> Path:  # fmt: skip
    """A run folder of a comparison."""
    share = float(size.rstrip("%")) / 100
    told = {"method": method, "size": size, "seed": seed, "lr": lr, "tokens": steps * 1024}
    after = replace(
        AFTER, parameters=round(BEFORE.parameters * share),
        loss=replace(AFTER.loss, value=loss, low=loss - 0.05, high=loss + 0.05),
        bits_per_byte=replace(AFTER.bits_per_byte, value=loss / 2.4137, low=loss / 2.4137 - 0.02,
                              high=loss / 2.4137 + 0.02),
        **changes,
    )  # fmt: skip
    rows = (replace(BEFORE, domain=after.domain), after)
    run_folder(path, {**MANIFEST, "compare": told, **(manifest or {})}, rows)
    write_curve(path / "train.jsonl", steps=steps, start=start or loss + 1, end=loss)
    return path


def family(folder: Path, seeds: Sequence[int] = (0, 1)) -> list[Path]:
    """Four methods at three sizes: what a comparison is made of."""
    folder.mkdir(exist_ok=True)
    found = []
    for m, (method, loss, start) in enumerate(
        [("lasso", 2.55, 3.1), ("narrowed", 2.65, 3.4), ("distilled", 3.6, 10.8),
         ("from scratch", 4.4, 10.8)]
    ):  # fmt: skip
        for s, size in enumerate(("70%", "50%", "35%")):
            for seed in seeds:
                found.append(write_compared(
                    folder / f"{method}-{size}-{seed}".replace("%", "").replace(" ", "-"),
                    method, size, seed, loss=loss + 0.22 * s + 0.03 * seed + 0.01 * m,
                    start=start + 0.3 * s,
                ))  # fmt: skip
    return found


def of(folder: Path) -> dict[str, figure_style.Drawn]:
    drawn, warnings = figures.draw(page_runs.read(folder))
    assert warnings == []
    return {d.name: d for d in drawn}


def compared(paths: Sequence[Path]) -> page_compare.Comparison:
    return page_compare.compare([page_runs.read(p) for p in paths])


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, figure_style.Drawn]:
    return of(full_run(tmp_path_factory.mktemp("full") / "run"))


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> page_compare.Comparison:
    return compared(family(tmp_path_factory.mktemp("family") / "runs"))


@pytest.fixture(scope="module")
def side_by_side(methods: page_compare.Comparison) -> dict[str, figure_style.Drawn]:
    return {d.name: d for d in figure_compare.draw(methods)}


def test_a_run_with_everything_has_every_figure(everything: dict[str, Any]) -> None:
    assert tuple(everything) == ALL
    assert all(d.alt and d.caption and d.title for d in everything.values())
    assert all(d.png.startswith(b"\x89PNG") and len(d.png) > 5000 for d in everything.values())


def test_a_comparison_has_every_figure(side_by_side: dict[str, Any]) -> None:
    assert list(side_by_side) == list(figure_compare.COMPARED)


def test_drawings_follow_the_page_and_files_stand_alone(
    everything: dict[str, Any], side_by_side: dict[str, Any]
) -> None:
    light = {colour for colour, _ in PALETTE.values()}
    assert len(light) == len(PALETTE)  # the colours of a drawing stand for their names
    drawn = [*everything.values(), *side_by_side.values()]
    ids: list[str] = []
    for d in drawn:
        ElementTree.fromstring(d.svg)
        ElementTree.fromstring(d.inline.replace("xlink:href", "href"))
        assert "var(--" in d.inline and "var(--" not in d.svg
        used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", d.inline))
        assert used <= {"#000000", "#ffffff"}, d.name
        assert "font-family" not in d.inline
        own = re.findall(r' id="([^"]+)"', d.inline)
        references = set(re.findall(r'(?:url\(#|href="#)([^")]+)', d.inline))
        assert references <= set(own)
        ids += own
    assert len(ids) == len(set(ids))  # they all stand on one page


def test_pictures_inside_a_drawing_have_a_dark_counterpart(everything: dict[str, Any]) -> None:
    inline = everything["scores-and-kept"].inline
    assert inline.count('class="light"') == inline.count('class="dark"') > 0
    navy_and_white = np.array([[[8, 43, 97, 255], [255, 255, 255, 128]]], np.uint8)
    turned = figure_style.dark(navy_and_white)
    assert turned[0, 0, :3].mean() > 170 and turned[0, 1, :3].max() == 0
    assert turned[0, :, 3].tolist() == [255, 128]


@pytest.mark.parametrize(
    ("gone", "lost"),
    [
        (["rows.jsonl"], {"loss-by-domain", "speed-and-size"}),
        (["lasso.jsonl", "recover.jsonl"], {"loss-curves"}),
        (["norms.safetensors"], {"norms"}),
        (["scores.safetensors"], {"stability"}),
        (["scores.safetensors", "model/keep.safetensors"], {"stability", "scores-and-kept"}),
    ],
)
def test_what_has_no_data_is_left_out(tmp_path: Path, gone: list[str], lost: set[str]) -> None:
    run = full_run(tmp_path / "run", layers=2, units=12, kept=6)
    for name in gone:
        (run / name).unlink()
    assert set(of(run)) == set(ALL) - lost


def test_an_empty_run_has_no_figures(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert of(tmp_path) == {}


@pytest.mark.parametrize("value", [None, {}, [], "surprise", 7, [None], [{"group": 3}], [[]]])
@pytest.mark.parametrize("key", ["plan", "stability"])
def test_a_strange_manifest_costs_a_figure_at_most(tmp_path: Path, key: str, value: Any) -> None:
    run = full_run(tmp_path / "run", layers=1, units=8, kept=4)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, key: value}))
    held = page_runs.read(run)
    with figure_style.styled():
        widths, stability = figures.widths(held), figures.stability(held)
    assert (widths is None) == (key == "plan")
    assert stability is not None
    assert ("kept by both" in stability.alt) == (key == "plan")


def test_broken_tensors_are_told_and_the_rest_is_drawn(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", layers=1, units=8, kept=4)
    (run / "norms.safetensors").write_bytes(b"broken")
    save_file({"model.layers.0.mlp": np.ones(5, bool)}, run / "model" / "keep.safetensors")
    drawn, warnings = figures.draw(page_runs.read(run))
    assert [d.name for d in drawn] == [n for n in ALL if n not in ("norms", "scores-and-kept")]
    assert len(warnings) == 2
    assert "8 scores and 5 units" in warnings[0]
    assert "norms.safetensors is not a readable" in warnings[1]


def test_figures_say_what_the_numbers_are(everything: dict[str, Any]) -> None:
    assert "python, held-out: before 2.404 [2.351, 2.460], after 2.801" in (
        everything["loss-by-domain"].alt
    )
    assert "+0.397" in everything["loss-by-domain"].svg
    assert "parameters 70.4 %" in everything["speed-and-size"].alt
    assert "prefill 1.45 x" in everything["speed-and-size"].alt
    assert "192 of 384 neurons were kept" in everything["scores-and-kept"].alt
    assert "48 to 48 of 96 in each of 4 layers" in everything["widths"].alt
    assert "192 of 384 exactly zero" in everything["norms"].alt
    assert "neurons: 91.3 % kept by both" in everything["stability"].alt
    assert "recovery: validation 2.900 to 2.6" in everything["loss-curves"].alt


def test_bins_are_means_and_keep_short_layers_short() -> None:
    long, brief = np.arange(256.0), np.array([7.0, 9.0])
    picture = figure_units._binned({"a": long, "b": brief}, ["a", "b"])
    assert picture.shape == (2, 128)
    assert picture[0, 0] == 0.5 and picture[0, -1] == 254.5
    assert picture[1, 0] == 8.0 and np.isnan(picture[1, 1:]).all()
    few = figure_units._binned({"a": brief}, ["a"])
    assert few.tolist() == [[7.0, 9.0]]


def test_rank_correlation_by_hand() -> None:
    rank = figure_units.rank_correlation
    assert rank(np.array([1.0, 2, 3]), np.array([10.0, 1000, 2000])) == pytest.approx(1)
    assert rank(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    # ranks 1 2.5 2.5 4 against 1 2 3 4: 4.5 / sqrt(4.5 * 5)
    tied = rank(np.array([1.0, 5, 5, 9]), np.array([1.0, 2, 3, 4]))
    assert tied == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(rank(np.ones(3), np.arange(3.0)))


@pytest.mark.parametrize(
    ("value", "text"),
    [(134_515_008, "135 M"), (94_698_048, "94.7 M"), (999, "999"), (999_960, "1 M"),
     (65_536, "65.5 k"), (0, "0"), (0.25, "0.25"), (6.2e13, "62 T"), (1500, "1.5 k"),
     (-2e6, "-2 M")],
)  # fmt: skip
def test_short_numbers(value: float, text: str) -> None:
    assert figure_style.short(value) == text


def test_names_of_others_can_be_drawn(tmp_path: Path) -> None:
    names = ["$x_{2$", "_hidden", "<b>&amp;", "a\x00b\x1b[31m", "中文 \U0001f600", "m" * 300]
    runs = [
        write_compared(tmp_path / str(n), name, "50%", 0, loss=2.5 + n / 10, steps=10)
        for n, name in enumerate(names)
    ]
    drawn = figure_compare.draw(compared(runs))
    assert len(drawn) == 4
    for d in drawn:
        shown = "".join(ElementTree.fromstring(d.svg).itertext())
        assert "_hidden" in shown and "$x_{2$" in shown and "<b>&amp;" in shown


def test_methods_past_the_eighth_share_a_colour_and_a_name(tmp_path: Path) -> None:
    runs = [
        write_compared(tmp_path / str(n), f"method {n}", "50%", 0, loss=2.5 + n / 10, steps=10)
        for n in range(11)
    ]
    drawn = figure_compare.draw(compared(runs))
    assert all("3 more" in d.svg and "method 7" in d.svg for d in drawn)
    assert all(">method 8<" not in d.svg for d in drawn)


def test_never_is_shown_as_such(side_by_side: dict[str, Any]) -> None:
    told = side_by_side["tokens-to-target"]
    assert ">never<" in told.svg
    assert re.search(r"from scratch 70% to [\d.]+: never", told.alt)


def test_bands_are_drawn_over_seeds_only(tmp_path: Path, side_by_side: dict[str, Any]) -> None:
    alone = figure_compare.draw(compared(family(tmp_path / "runs", seeds=(0,))))
    band = "fill-opacity: 0.18"
    assert band in side_by_side["loss-by-tokens"].svg
    assert all(band not in d.svg for d in alone)


def test_seeds_make_a_mean_and_a_range(tmp_path: Path) -> None:
    runs = [write_compared(tmp_path / str(s), "m", "50%", s, loss=2.5 + 0.1 * s) for s in range(3)]
    (group,) = compared(runs).groups
    assert group.estimate.value == pytest.approx(2.6)
    assert (group.estimate.low, group.estimate.high) == pytest.approx((2.5, 2.7))
    tokens, mean, low, high = group.band
    assert tokens[-1] == 102_400 and np.all((low < mean) & (mean < high) | (low == high))


def test_a_vocabulary_shows_in_bytes_per_token(tmp_path: Path) -> None:
    first = write_compared(tmp_path / "a", "a", "50%", 0, loss=2.5, steps=10)
    second = write_compared(tmp_path / "b", "b", "50%", 0, loss=2.5, steps=10)
    lines = [json.loads(line) for line in (second / "rows.jsonl").read_text().splitlines()]
    lines[-1]["bits_per_byte"] *= 1.1
    (second / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compared([first, second])
    assert found.metric == "bits_per_byte" and "Vocabularies differ" in found.warnings[0]
    names = {d.name for d in figure_compare.draw(found)}
    assert names == {"frontier"}  # losses while training cannot be compared


def test_comparisons_are_in_the_measure_that_fits(tmp_path: Path) -> None:
    runs = family(tmp_path / "runs", seeds=(0,))
    assert compared(runs).sizes == ["70%", "50%", "35%"]
    assert compared(runs).methods == ["lasso", "narrowed", "distilled", "from scratch"]
    assert page_compare.targets(compared(runs)) == sorted(page_compare.targets(compared(runs)))


def test_a_curve_that_was_cut_off_is_told(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    write_curve(run / "train.jsonl", steps=20, start=3, end=2)
    with (run / "train.jsonl").open("a") as file:
        file.write('[1]\n{"tokens": "many"}\n{"tokens": 99, "loss": null}\n{"step": 21, "tok')
    curve, lost = page_runs.read_curve(run / "train.jsonl")
    assert curve is not None and lost == 3
    assert len(curve["tokens"]) == 22 and np.isnan(curve["loss"][1])
    (warning,) = page_runs.read(run).warnings
    assert "3 of its lines" in warning


def test_stages_follow_each_other_on_one_axis(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", layers=1, units=8, kept=4)
    tokens, losses, kind = page_runs.whole_curve(page_runs.read(run))
    assert kind == "validation" and np.all(np.diff(tokens) >= 0)
    assert tokens[-1] == (60 + 120) * 1024 and losses[-1] == pytest.approx(2.6, abs=0.02)


def test_tokens_to_a_loss_by_hand(tmp_path: Path) -> None:
    def curve(path: Path, points: list[tuple[int, float]]) -> None:
        lines = [{"step": t, "tokens": t, "validation": loss} for t, loss in points]
        (path / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))

    best, other, worse, never = (
        write_compared(tmp_path / n, n, "50%", 0, loss=loss)
        for n, loss in (("best", 2.0), ("other", 3.0), ("worse", 4.0), ("never", 2.2))
    )
    curve(best, [(0, 4.0), (100, 3.1), (200, 2.9), (1000, 2.0)])
    curve(other, [(0, 9.0), (500, 3.4), (1000, 3.0)])
    curve(worse, [(0, 9.0), (1000, 4.0)])
    curve(never, [(0, 2.5), (1000, 1.9)])
    found = compared([best, other, worse, never])
    assert found.champion == "best"
    ratios = {a.other: (a.loss, a.tokens, a.other_tokens, a.ratio) for a in found.advantages}
    assert ratios == {
        "other": (3.0, 200, 1000, 5.0), "worse": (4.0, 0, 1000, float("inf")),
        "never": (1.9, float("inf"), 1000, 0.0),
    }  # fmt: skip
    said = {k["name"]: k["value"] for k in page_compared.compared_page(found, [])["keys"]}
    assert said["fewer tokens for the best loss of other"] == "5.0\u00d7"
    assert said["tokens needed for the best loss of worse"] == "0"
    assert said["to the best loss of never"] == "never"
    table = page_compared.advantages_table(found)
    assert ["50%", "never", "1.900", "1 k", "never", "never"] in table


def test_the_learning_rate_is_chosen_on_calibration_text(tmp_path: Path) -> None:
    """The one with the lower validation loss speaks, though held-out text would say the other."""
    better = write_compared(tmp_path / "a", "m", "50%", 0, loss=2.9, lr=1e-3)
    worse = write_compared(tmp_path / "b", "m", "50%", 0, loss=2.5, lr=1e-2)
    small = write_compared(tmp_path / "c", "m", "50%", 0, loss=2.0, lr=1e-3, steps=10)
    write_curve(better / "train.jsonl", steps=100, start=4, end=2.6)
    write_curve(worse / "train.jsonl", steps=100, start=4, end=2.8)
    found = compared([better, worse, small])
    assert [e.run.label for e in found.entries if e.chosen] == ["a"]
    lines = page_compared.runs_table(found)["lines"]
    assert [line["aside"] for line in lines].count(True) == 2
    told = page_compared.compared_page(found, [])["lede"]
    assert "2 runs of other learning rates or smaller budgets are in the table only" in told
