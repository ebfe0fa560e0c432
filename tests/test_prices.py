"""What removals cost and save: trials are what removing really does, curves are monotone."""

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from llm_narrow import budget, cli_prices, inputs, pricing, scoring
from llm_narrow.budget import Removal, kinds_of, ledger
from llm_narrow.cost import flops_per_token
from llm_narrow.curves import convex, curve, exponent, gone
from llm_narrow.decision import Decision, carry_out
from llm_narrow.depth import layers_of
from llm_narrow.errors import BadInput, UnknownName
from llm_narrow.families import find_groups
from llm_narrow.losses import language_loss
from llm_narrow.prices import Prices, price, rate_of, removals, spearman
from llm_narrow.scores import score
from llm_narrow.spend import spend
from llm_narrow.trials import Log, Measured, Text, Trials
from tiny import CONFIGS, batch, tiny

FAMILIES = sorted(set(CONFIGS) - {"mlp"})


def text(kind: str = "llama") -> Text:
    """Two batches to measure on and four to refit on."""
    made = [batch(kind, seed=n, length=16) for n in range(6)]
    return Text(measured=made[:2], fitted=made[2:])


def loss(model: Any, of: Text) -> float:
    with torch.no_grad():
        return sum(float(language_loss(model, b)) for b in of.measured) / of.targets


@torch.no_grad()
def divergence(whole: Any, narrow: Any, of: Text) -> float:
    """The mean of KL(whole || narrow) over all positions that have a next token."""
    found = 0.0
    for b in of.measured:
        p, q = (m(b).logits[:, :-1].double().log_softmax(-1) for m in (whole, narrow))
        found += float((p.exp() * (p - q)).sum())
    return found / of.targets


def everything(model: Any) -> list[Removal]:
    """Every large removal, and a third of the neurons of every group."""
    layers = layers_of(model)
    found = [r for layer in layers for r in removals(layer)]
    for layer in layers:
        for g in layer.mlp:
            if g.kind == "neurons":
                units = tuple(range(0, g.size, 3))
                found.append(Removal("neurons", layer.number, g.name, units))
    return found


def priced(log: Log | None = None, **given: Any) -> Prices:
    model = tiny("llama", num_hidden_layers=4)
    return price(model, text(), scores_of(model), log=log, **given)


def scores_of(model: Any) -> dict[str, Tensor]:
    return score(model, find_groups(model), text().fitted)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_trial_is_what_removing_really_does(kind: str) -> None:
    """The loss after a trial, and what the ledger says is left, against the model cut for real."""
    model, on = tiny(kind), text(kind)
    layers, whole = layers_of(model), Decision.whole(layers_of(model))
    books, trying = ledger(model, layers), Trials(model, whole, on, Log())
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = everything(model)
    for removal, rise in zip(found, trying.rises(found), strict=True):
        cut, decision = copy.deepcopy(model), whole.without(layers, removal)
        carry_out(cut, decision, on.fitted, sequential=False)
        assert loss(cut, on) - loss(model, on) == pytest.approx(rise.loss, abs=1e-4)
        assert divergence(model, cut, on) == pytest.approx(rise.divergence, abs=1e-4)
        left = books.total(decision.kept, decision.layers.tolist())
        assert left.parameters == sum(p.numel() for p in cut.parameters())
        assert left.flops == pytest.approx(flops_per_token(cut))
        cached = budget._cached(cut, int(decision.layers.sum()))
        assert left.kv_bytes == pytest.approx(4 * sum(cached))
    for name, p in model.named_parameters():
        assert p.equal(before[name])


def test_a_trial_in_a_narrowed_model_is_what_removing_both_does() -> None:
    """Layers before the one that changes are passed over, and numbers are those of the whole."""
    model, on = tiny("llama", num_hidden_layers=4), text()
    layers = layers_of(model)
    first = Decision.whole(layers)
    for removal in (
        Removal("layers", 1), Removal("attention", 2),
        Removal("heads", 3, layers[3].attention[0].name, (0,)),
        Removal("neurons", 3, layers[3].mlp[0].name, (1, 4, 7)),
    ):  # fmt: skip
        first = first.without(layers, removal)
    trying = Trials(model, first, on, Log())
    tried = [
        Removal("layers", 2), Removal("mlp", 0),
        Removal("neurons", 3, layers[3].mlp[0].name, (0, 2, 40)),
    ]  # fmt: skip
    narrow = copy.deepcopy(model)
    carry_out(narrow, first, on.fitted)
    assert trying.loss() == pytest.approx(loss(narrow, on), abs=1e-5)
    assert trying.divergence() == pytest.approx(divergence(model, narrow, on), abs=1e-5)
    for removal, rise in zip(tried[:2], trying.rises(tried[:2]), strict=True):
        cut = copy.deepcopy(model)
        carry_out(cut, first.without(layers, removal), on.fitted)
        if removal.kind == "layers":  # the readers of the rest were refitted with it still there
            assert rise.loss == pytest.approx(loss(cut, on) - trying.loss(), abs=0.2)
        assert math.isfinite(rise.loss) and math.isfinite(rise.divergence)
    (rise,) = trying.rises(tried[2:])
    stays = first.keep[tried[2].group]
    assert not stays[[1, 4, 7]].any() and stays[[0, 2, 40]].all()
    assert rise.loss != 0 and rise.divergence != 0


def test_layers_that_come_before_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", num_hidden_layers=4)
    trying = Trials(model, Decision.whole(layers_of(model)), text(), Log())
    trying.loss()
    ran: list[int] = []
    for number, layer in enumerate(trying._narrow.model.layers):

        def count(_: Any, __: Any, number: int = number) -> None:
            ran.append(number)

        layer.self_attn.o_proj.register_forward_pre_hook(count)
    trying.rises([Removal("mlp", 2)])
    assert sorted(set(ran)) == [2, 3]
    ran.clear()
    trying.rises([Removal("layers", 2)])
    assert sorted(set(ran)) == [3]


def test_what_was_measured_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in the middle, which cuts a line short, costs that line only."""
    whole = priced()
    file, count = tmp_path / "prices" / "x.jsonl", 0
    really = Trials._measured

    def counting(self: Trials, removal: Removal | None) -> Measured:
        nonlocal count
        count += 1
        if stop_at and count > stop_at:
            raise KeyboardInterrupt
        return really(self, removal)

    monkeypatch.setattr(Trials, "_measured", counting)
    stop_at = 9
    with pytest.raises(KeyboardInterrupt):
        priced(Log.open(file))
    kept = file.read_text().splitlines()
    file.write_text("\n".join([*kept, kept[-1][: len(kept[-1]) // 2]]))
    stop_at, count = 0, 0
    again = priced(Log.open(file))
    assert [p.increase for p in again.large] == pytest.approx([p.increase for p in whole.large])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({(x["decision"], x["removal"]) for x in lines}) == len(lines) == count + len(kept)
    count = 0
    priced(Log.open(file))
    assert count == 0


def test_every_kind_has_a_price_and_the_sums_are_right() -> None:
    found = priced()
    model = tiny("llama", num_hidden_layers=4)
    assert found.kinds == ("neurons", "heads", "attention", "mlp", "layers")
    assert len(found.large) == 4 * (2 + 1 + 1 + 1)
    assert found.whole.parameters == sum(p.numel() for p in model.parameters())
    layer = next(p for p in found.large if p.removal.kind == "layers")
    own = sum(p.numel() for p in model.model.layers[0].parameters())
    assert layer.saves.parameters == own
    assert layer.per("parameters", 1e6) == pytest.approx(layer.increase / own * 1e6)
    assert next(p for p in found.large if p.removal.kind == "mlp").per("kv_bytes") == math.inf
    facts = json.loads(json.dumps(found.facts()))
    assert facts["loss"] == pytest.approx(loss(model, text()))
    assert len(facts["curves"]) == 4


def test_some_kinds_alone_can_be_priced() -> None:
    assert priced(kinds=["heads"]).kinds == ("heads",)
    assert priced(kinds=["neurons"]).kinds == ("neurons",)


def test_a_kind_that_the_model_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(UnknownName, match=r"experts.*heads, layers, mlp, neurons"):
        priced(kinds=["experts"])


def test_kinds_of_a_model_are_those_of_its_groups() -> None:
    assert kinds_of(find_groups(tiny("mpt"))) == ("neurons", "mlp", "layers")
    assert "experts" in kinds_of(find_groups(tiny("mixtral", num_experts_per_tok=2)))


def test_a_model_without_layers_is_refused() -> None:
    model = tiny("mlp")
    with pytest.raises(BadInput, match="no list of layers"):
        layers_of(model)


points = st.lists(
    st.tuples(st.floats(0.001, 1), st.floats(-1, 5)), min_size=1, max_size=8,
    unique_by=lambda p: round(p[0], 3),
).map(sorted)  # fmt: skip


@settings(deadline=None)
@given(points)
def test_curves_rise_and_are_convex(own: list[tuple[float, float]]) -> None:
    x, y = (torch.tensor(v, dtype=torch.float64) for v in zip(*convex(own), strict=True))
    slopes = y.diff() / x.diff()
    assert x[0] == y[0] == 0
    assert (x.diff() > 0).all()
    assert (slopes >= 0).all()
    assert (slopes.diff() > -1e-6 * slopes.abs().max().clamp(min=1)).all()


def test_a_convex_line_is_left_as_it_is() -> None:
    own = [(0.25, 0.1), (0.5, 0.4), (1.0, 2.0)]
    for (x, y), (a, b) in zip([(0.0, 0.0), *own], convex(own), strict=True):
        assert (x, y) == pytest.approx((a, b))


def test_a_power_law_is_found_and_followed() -> None:
    layers = [[(s, c * s**1.7) for s in (0.02, 0.1, 0.3)] for c in (0.5, 3.0)]
    assert exponent(layers) == pytest.approx(1.7)
    scores = torch.arange(1.0, 101.0)
    found = curve("g", 0, scores, {20: 0.5}, power=1.7)
    shares = gone(scores)
    wanted = 0.5 * float(shares[50] / shares[20]) ** 1.7
    assert float(found.by_units(scores)[50]) == pytest.approx(wanted)
    assert float(found.by_units(scores)[0]) == 0.0


def test_a_curve_goes_through_what_was_tried() -> None:
    """Between two trials it is their own power law; what cost nothing bends nothing."""
    scores = torch.ones(100)  # shares are numbers
    found = curve("g", 0, scores, {20: 0.01, 50: 0.2}, power=1.5, whole=4.0).by_units(scores)
    assert found[[20, 50, 100]].tolist() == pytest.approx([0.01, 0.2, 4.0])
    assert float(found[10]) == pytest.approx(0.01 * 0.5**1.5)
    own = math.log(4.0 / 0.2) / math.log(2)
    assert float(found[70]) == pytest.approx(0.2 * 1.4**own)
    flat = curve("g", 0, scores, {20: -0.006}, power=1.5, whole=0.9).by_units(scores)
    assert float(flat[50]) == pytest.approx(0.9 * 0.5**1.5)


def test_the_rate_is_that_of_small_removals() -> None:
    rises = [Measured(0.03, 0.02), Measured(-0.01, 0.02), Measured(9.0, 8.0), Measured(1.0, 0.0)]
    assert rate_of(rises) == pytest.approx(0.02 / 0.04)
    assert rate_of([Measured(-0.03, 0.02)]) == pytest.approx(0.1)
    assert rate_of([Measured(9.0, 8.0)]) == 1.0


def test_prices_are_of_divergence_and_tell_the_loss_beside_it() -> None:
    model, on = tiny("llama", num_hidden_layers=4), text()
    found, trying = priced(), Trials(model, Decision.whole(layers_of(model)), on, Log())
    for one in found.large:
        (rise,) = trying.rises([one.removal])
        assert one.increase == pytest.approx(found.rate * rise.divergence)
        assert one.measured == pytest.approx(rise.loss)


def test_lowest_scores_go_first() -> None:
    shares = gone(torch.tensor([3.0, 1.0, 6.0]))
    assert shares.tolist() == pytest.approx([0, 0.1, 0.4, 1])
    assert gone(torch.zeros(4)).tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize(
    "pairs, wanted",
    [
        ([(1, 10), (2, 20), (9, 21)], 1.0),
        ([(1, 3), (2, 2), (3, 1)], -1.0),
        ([(1, 1), (2, 1), (3, 1)], 0.0),
        ([(1, 2), (2, 1), (3, 3), (4, 4)], 0.8),
    ],
)
def test_rank_correlation(pairs: list[tuple[float, float]], wanted: float) -> None:
    assert spearman(pairs) == pytest.approx(wanted)


def test_a_budget_becomes_a_plan(model_folder: Path, domain_folder: Path) -> None:
    """As `prune` calls it: list, spend with trials, show the plan, carry it out."""
    given = {
        "model": str(model_folder), "domain": str(domain_folder), "length": 32,
        "calibration_tokens": 512,
    }  # fmt: skip
    recipe, _, track = inputs.begin(None, given, None)
    start = inputs.gather(recipe, track=track)
    start = dataclasses.replace(start, groups=start.all_groups)
    model = start.loaded.model
    ground = pricing.ground_of(start, recipe, blocks=3, fit_tokens=512)
    blocks = inputs.calibration(start, recipe)
    listed = pricing.listed(start, ground, scoring.made(start, recipe, blocks).scores)
    whole = sum(p.numel() for p in model.parameters())
    (spent,) = spend(listed, {"parameters": 0.8 * whole}, rounds=2, trials=ground.trials(model))
    plan = pricing.plan_of(start, spent)
    groups, keep, facts = carry_out(model, spent.decision, blocks.batches(2))
    assert plan.parameters_before == whole
    assert plan.parameters_after == sum(p.numel() for p in model.parameters()) <= 0.8 * whole
    assert {row.group for row in plan.rows} == {g.name for g in start.all_groups}
    assert facts is not None and facts.tokens == blocks.tokens.numel()
    assert {g.name: len(keep[g.name]) for g in groups} == {g.name: g.size for g in groups}


def app() -> Any:
    """The command alone, as the command line has it."""
    made = typer.Typer()
    made.command()(cli_prices.prices)
    return made


def test_the_command_tells_every_price(
    model_folder: Path, domain_folder: Path, tmp_path: Path
) -> None:
    settings = ["--length", "32", "--calibration-tokens", "512", "--fit-tokens", "512"]
    told = [str(model_folder), "--domain", str(domain_folder), *settings, "--sizes", "90%,80%"]
    picture = tmp_path / "prices.svg"
    done = CliRunner().invoke(app(), [*told, "--json", "--quiet", "--figure", str(picture)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {row["kind"] for row in found["large"]} == {"heads", "attention", "mlp", "layers"}
    assert list(found["sizes"]) == ["90%", "80%"]
    assert "<svg" in picture.read_text()
    shown = CliRunner().invoke(app(), [*told, "--quiet"])
    assert shown.exit_code == 0
    for words in ("Prices of each kind", "cheapest single removals", "What sizes would buy"):
        assert words in shown.stdout


def test_a_figure_of_another_kind_is_refused(model_folder: Path, domain_folder: Path) -> None:
    told = [str(model_folder), "--domain", str(domain_folder), "--figure", "prices.txt"]
    done = CliRunner().invoke(app(), told)
    assert isinstance(done.exception, BadInput)
