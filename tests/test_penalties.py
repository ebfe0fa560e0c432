"""Penalties, their gradients and the weights of units: against values worked out by hand."""

import pytest
import torch

from llm_narrow import penalties, units
from llm_narrow.errors import BadInput, UnknownName
from llm_narrow.families import FAMILIES
from llm_narrow.penalties import (
    PENALTIES,
    add_gradient,
    penalty,
    proximal_step,
    unit_norms,
    unit_weights,
    weights_from_scores,
    without_biases,
)
from llm_narrow.units import Group
from tiny import parts, two_units

every_family = pytest.mark.parametrize("kind", FAMILIES)


def test_penalties_by_hand():
    groups, params = two_units()
    one, size = (unit_weights(groups, params, w) for w in ("one", "size"))
    value = {name: p(groups, params, one).item() for name, p in PENALTIES.items()}
    assert value["group_lasso"] == pytest.approx(18)
    assert value["l1"] == pytest.approx(24)
    assert value["l_half_of_l2"] == pytest.approx((5**0.5 + 13**0.5) ** 2)
    assert value["hoyer"] == pytest.approx(18 / 194**0.5)
    assert PENALTIES["group_lasso"](groups, params, size).item() == pytest.approx(18 * 3**0.5)


def test_biases_count_unless_left_out():
    _, groups, params = parts("mlp")
    bias = params["0.bias"][3].item()
    whole, bare = unit_norms(groups, params), unit_norms(without_biases(groups), params)
    assert whole["0"][3].item() ** 2 == pytest.approx(bare["0"][3].item() ** 2 + bias**2, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_size_weights_count_the_entries_of_a_unit(kind):
    """By what removing one unit takes away."""
    _, groups, params = parts(kind)
    for g in groups:
        keep = units.keep_all(groups)
        keep[g.name][1] = False
        lost = sum(p.numel() for p in params.values()) - units.count(params, groups, keep)
        assert unit_weights(groups, params)[g.name][0].item() ** 2 == pytest.approx(lost)


@every_family
@pytest.mark.parametrize("name", PENALTIES)
def test_gradient_on_what_units_own_and_nowhere_else(kind, name):
    model, groups, params = parts(kind)
    weights = unit_weights(groups, params)
    penalty(name)(groups, params, weights).backward()
    for path, p in params.items():
        owned = torch.zeros(p.shape, dtype=torch.bool)
        for g in groups:
            for s in g.slices:
                if s.param == path:
                    owned.index_fill_(s.dim, units.positions(s, torch.arange(g.size)), True)
        moved = torch.zeros(p.shape, dtype=torch.bool) if p.grad is None else p.grad != 0
        assert torch.equal(moved, owned), path
    # The closed form that training uses adds the same.
    expected = {path: None if p.grad is None else p.grad.clone() for path, p in params.items()}
    model.zero_grad()
    before = penalty(name)(groups, params, weights).item()
    value = add_gradient(penalty(name), 0.25, groups, params, weights)
    assert value.item() == pytest.approx(before, rel=1e-6)
    for path, p in params.items():
        if expected[path] is None:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, 0.25 * expected[path], rtol=1e-4, atol=1e-7)


def test_the_gradient_is_added_to_what_is_there():
    groups, params = two_units()
    params["in"].grad = torch.ones(2, 2)
    add_gradient(penalty("group_lasso"), 2.0, groups, params, unit_weights(groups, params, "one"))
    torch.testing.assert_close(params["in"].grad, 1 + torch.tensor([[1.2, 0], [0, 24 / 13]]))
    torch.testing.assert_close(params["out"].grad, torch.tensor([[1.6, 10 / 13]]))


@pytest.mark.parametrize("zeros", ["one unit", "all units"])
@pytest.mark.parametrize("name", PENALTIES)
def test_zeros_never_give_nan(name, zeros):
    model, groups, params = parts("llama")
    keep = {g.name: torch.zeros(g.size, dtype=torch.bool) for g in groups}
    if zeros == "one unit":
        for stays in keep.values():
            stays[1:] = True
    units.mask(model, groups, keep)
    weights = unit_weights(groups, params)
    value = penalty(name)(groups, params, weights)
    value.backward()
    add_gradient(penalty(name), 1.0, groups, params, weights)
    assert value.isfinite()
    for g in groups:
        for s in g.slices:
            assert params[s.param].grad.isfinite().all()
            rows = units.unit_rows(params[s.param].grad, s, g.size)
            assert not rows[0].any()  # a unit of zeros is not pushed anywhere
    before = {path: p.detach().clone() for path, p in params.items()}
    for amount in (0.0, 1e-3):
        proximal_step(groups, params, weights, amount)
        assert all(p.isfinite().all() for p in params.values())
        if amount == 0:
            assert all(torch.equal(p, before[path]) for path, p in params.items())


# Weights from scores ------------------------------------------------------------------------------


def test_weights_from_scores_separate_units_of_equal_norm():
    groups = [Group("g", "neurons", 8, (), ()), Group("h", "heads", 2, (), ())]
    ones = {"g": torch.ones(8), "h": torch.ones(2)}
    scores = {"g": torch.tensor([5.0, 1, 8, 2, 6, 3, 7, 4]), "h": torch.zeros(2)}
    w = weights_from_scores(scores, groups, sparsity={"neurons": 0.5}, times=ones, spare=0.5)
    # Ranks 0, 1/8, …; the edge is 0.75, so that the lowest have 1, 5/6, 4/6, …
    expected = torch.tensor([2, 6, 0, 5, 1, 4, 0, 3]) / 6
    torch.testing.assert_close(w["g"], expected)
    assert not w["h"].any()
    twice = {name: 2 * o for name, o in ones.items()}
    w2 = weights_from_scores(scores, groups, sparsity={"neurons": 0.5}, times=twice, spare=0.5)
    torch.testing.assert_close(w2["g"], 2 * expected)


def test_weights_from_scores_over_groups_and_of_equal_scores():
    groups = [Group(n, "neurons", 2, (), ()) for n in "ab"]
    ones = {n: torch.ones(2) for n in "ab"}
    scores = {"a": torch.tensor([1.0, 2]), "b": torch.tensor([3.0, 3])}
    sparsity = {"neurons": 0.8}
    apart = weights_from_scores(scores, groups, sparsity=sparsity, times=ones)
    assert apart["a"].tolist() == [1.0, 0.5] and apart["b"].tolist() == [0.75, 0.75]
    pooled = weights_from_scores(
        scores, groups, sparsity=sparsity, times=ones, allocation="global"
    )
    assert pooled["a"].tolist() == [1.0, 0.75] and pooled["b"].tolist() == [0.375, 0.375]


def test_bad_input_says_value_and_rule():
    groups, params = two_units()
    weights = unit_weights(groups, params)
    before = [p.detach().clone() for p in params.values()]
    with pytest.raises(UnknownName, match=r"'grup_lasso' is unknown\. Did you mean 'group_l"):
        penalty("grup_lasso")
    with pytest.raises(UnknownName, match="group weighting 'sizes'"):
        unit_weights(groups, params, "sizes")  # type: ignore[arg-type]
    for amount in (-0.1, float("nan")):
        with pytest.raises(BadInput, match="strength must be at least 0, got"):
            proximal_step(groups, params, weights, amount)
        with pytest.raises(BadInput, match="strength must be at least 0, got"):
            add_gradient(penalty("l1"), amount, groups, params, weights)
    with pytest.raises(BadInput, match="sparsity of neurons must be at least 0 and below 1, got 1"):
        weights_from_scores(
            {"g": torch.ones(2)}, groups, sparsity={"neurons": 1.0}, times=weights
        )
    assert all(torch.equal(p, b) for p, b in zip(params.values(), before, strict=True))
    assert penalties.WEIGHTINGS == ("size", "one")
