"""Choosing is exact in number, monotone in score, and hits a size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_narrow import units
from llm_narrow.errors import TargetOutOfReach
from llm_narrow.families import find_groups
from llm_narrow.plan import Allocation, by_parameters, by_sparsity, select
from llm_narrow.units import Group, Kind, Scores
from tiny import tiny


def row(sizes: list[int], kind: Kind = "neurons") -> list[Group]:
    return [Group(f"g{i}", kind, n, writes=(), reads=()) for i, n in enumerate(sizes)]


def random_scores(groups: list[Group], seed: int = 0) -> Scores:
    g = torch.Generator().manual_seed(seed)
    return {x.name: torch.rand(x.size, generator=g) for x in groups}


sizes = st.lists(st.integers(1, 60), min_size=1, max_size=6)
shares = st.floats(0.01, 0.99)


@settings(deadline=None)
@given(sizes, shares, st.integers(0, 5))
def test_global_choice_is_exact_in_number_and_keeps_a_unit_everywhere(
    n: list[int], share: float, seed: int
) -> None:
    groups = row(n)
    keep = select(
        random_scores(groups, seed), groups, sparsity={"neurons": share}, allocation="global"
    )
    wanted = min(sum(n), max(1, int((1 - share) * sum(n) + 0.5)))
    assert sum(int(k.sum()) for k in keep.values()) == max(wanted, len(n))
    assert all(k.any() for k in keep.values())


@settings(deadline=None)
@given(sizes, shares, st.sampled_from(["uniform", "global"]), st.sampled_from([1, 4, 8]))
def test_no_unit_goes_while_a_worse_one_of_its_group_stays(
    n: list[int], share: float, allocation: Allocation, multiple: int
) -> None:
    groups = row(n)
    scores = random_scores(groups)
    keep = select(
        scores,
        groups,
        sparsity={"neurons": share},
        allocation=allocation,
        multiple=multiple,
    )
    for g in groups:
        stays, goes = scores[g.name][keep[g.name]], scores[g.name][~keep[g.name]]
        assert not len(goes) or stays.min() >= goes.max()
        assert len(stays) % multiple == 0 or len(stays) == g.size


@settings(deadline=None)
@given(sizes, shares)
def test_uniform_choice_takes_the_same_share_of_every_group(n: list[int], share: float) -> None:
    groups = row(n)
    keep = select(random_scores(groups), groups, sparsity={"neurons": share})
    for g in groups:
        assert abs(int(keep[g.name].sum()) - (1 - share) * g.size) <= 0.5 or keep[g.name].sum() == 1


def test_global_choice_without_rounding_is_a_threshold() -> None:
    groups = row([4, 4])
    scores = {"g0": torch.tensor([9.0, 8, 7, 1]), "g1": torch.tensor([6.0, 5, 2, 3])}
    keep = select(scores, groups, sparsity={"neurons": 0.5}, allocation="global")
    assert keep["g0"].tolist() == [True, True, True, False]
    assert keep["g1"].tolist() == [True, False, False, False]


def test_kinds_have_their_own_sparsity_and_heads_are_not_rounded() -> None:
    model = tiny("gpt_neox")
    groups = find_groups(model)
    scores = random_scores(groups)
    plan = by_sparsity(model, groups, scores, sparsity={"neurons": 0.5, "heads": 0.25}, multiple=8)
    assert {r.kind: (r.before, r.after) for r in plan.rows} == {
        "neurons": (48, 24),
        "heads": (4, 3),
    }
    real = tiny("gpt_neox")
    units.remove(real, groups, plan.keep)
    assert plan.parameters_after == sum(p.numel() for p in real.parameters())
    assert plan.bytes_before == 4 * plan.parameters_before


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("share", [0.95, 0.8, 0.7])
def test_a_size_is_hit_to_one_step(allocation: Allocation, share: float) -> None:
    model = tiny("llama")
    groups = find_groups(model)
    scores = random_scores(groups)
    whole = sum(p.numel() for p in model.parameters())
    target = int(share * whole)
    plan = by_parameters(
        model,
        groups,
        scores,
        target=target,
        kinds=["neurons"],
        allocation=allocation,
        multiple=1,
    )
    one = 3 * 32  # a gate row, an up row, a down column
    step = one * (2 if allocation == "uniform" else 1)  # one neuron in each of two layers, or one
    assert target - step < plan.parameters_after <= target


def test_a_size_out_of_reach_tells_the_least_that_can_be_reached() -> None:
    model = tiny("llama")
    groups = find_groups(model)
    scores = random_scores(groups)
    with pytest.raises(TargetOutOfReach, match=r"below [\d,]+, the least that removing neurons"):
        by_parameters(model, groups, scores, target=10, kinds=["neurons"])
    with pytest.raises(TargetOutOfReach, match="above"):
        by_parameters(model, groups, scores, target=10**9, kinds=["neurons"])


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_sparsity_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(TargetOutOfReach, match="sparsity of neurons must be"):
        select({}, row([4]), sparsity={"neurons": share})
