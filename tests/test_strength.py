"""Controllers of the penalty: what they reach, how fast they may move, and that they remember."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llm_narrow import units
from llm_narrow.errors import BadInput, TargetOutOfReach
from llm_narrow.families import find_groups
from llm_narrow.penalties import (
    proximal_step,
    scale_units,
    unit_norms,
    unit_weights,
    weights_from_scores,
    zero_groups,
    zero_share,
)
from llm_narrow.plan import select
from llm_narrow.strength import (
    Controller,
    Fixed,
    LossDriven,
    Seen,
    Shrinking,
    State,
    Target,
    needed_strength,
    removal_places,
)
from llm_narrow.units import Group
from tiny import tiny, uneven

LR = 2e-4
GROUPS = [Group(f"{i}", "neurons", 100, (), ()) for i in range(3)]


def simulated(
    controller: Controller,
    *,
    steps: int = 200,
    push: float = 0.0,
    weights: dict[str, Tensor] | None = None,
    loss=lambda step, zero: 2.4,
    validate: int = 5,
) -> list[tuple[State, float]]:
    """Norms as those of a trained model, 7.9 give or take, shortened as the proximal step does.

    `push` is how much of every step's shortening training gives back to units that are not zero.
    """
    g = torch.Generator().manual_seed(0)
    norms = {x.name: 7.9 + 0.5 * torch.randn(x.size, generator=g) for x in GROUPS}
    weights = weights or {x.name: torch.full((x.size,), 41.6) for x in GROUPS}

    def needed(left: int) -> float:
        share = controller.target if isinstance(controller, Target) else 0.5
        return needed_strength(norms, weights, share=share, learning=LR * left)

    state = controller.begin(needed(steps))
    history = [(state, zero_share(norms))]
    for step in range(1, steps + 1):
        for name, n in norms.items():
            lost = LR * state.strength * weights[name]
            norms[name] = torch.where(n > lost, n - (1 - push) * lost, 0)
        zero = zero_share(norms)
        seen = Seen(loss(step, zero), zero, needed(steps - step) if controller.decides(state)
                    else math.nan)  # fmt: skip
        if step % validate == 0:
            seen = replace(seen, validation=loss(step, zero))
        state = controller.after(state, seen)
        history.append((state, zero))
    return history


def separated(spare: float = 0.25) -> dict[str, Tensor]:
    """Weights by (random) scores for half of the units."""
    g = torch.Generator().manual_seed(1)
    scores = {x.name: torch.rand(x.size, generator=g) for x in GROUPS}
    times = {x.name: torch.full((x.size,), 41.6) for x in GROUPS}
    return weights_from_scores(
        scores, GROUPS, sparsity={"neurons": 0.5}, times=times, spare=spare
    )


# Target -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("push", [0.0, 0.3])
def test_a_target_is_reached_with_weights_that_separate(push):
    history = simulated(Target(0.5, steps=200), push=push, weights=separated())
    assert 0.48 <= history[-1][1] <= 0.52
    assert history[100][1] > 0.1  # units go one after the other


def test_where_training_resists_too_much_the_target_is_missed_by_little():
    """The bound comes first; the rest is for the scores."""
    history = simulated(Target(0.5, steps=200), push=0.6, weights=separated())
    assert 0.42 < history[-1][1] < 0.5


def test_without_resistance_the_first_strength_is_the_right_one():
    history = simulated(Target(0.5, steps=200), weights=separated())
    strengths = [state.strength for state, _ in history]
    assert strengths[0] == pytest.approx(strengths[190], rel=0.05)
    assert history[-1][1] == pytest.approx(0.5, abs=0.01)


def test_equal_weights_reach_zero_together():
    """Why weights by score exist: norms of 7 to 9, and half of the units are zero within a sixth
    of the run. The target is reached all the same."""
    shares = [zero for _, zero in simulated(Target(0.5, steps=200))]
    assert shares[160] < 0.02 and shares[-1] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("push", [0.0, 0.9])
def test_the_strength_never_moves_faster_than_its_bound(push):
    controller = Target(0.5, steps=200, patience=7, bound=1.2)
    history = [state for state, _ in simulated(controller, push=push, weights=separated())]
    moves = [n for n in range(1, 201) if history[n].strength != history[n - 1].strength]
    assert moves and all(b - a >= 7 for a, b in itertools.pairwise(moves))
    for n in moves:
        ratio = history[n].strength / history[n - 1].strength
        assert 1 / 1.2 - 1e-9 <= ratio <= 1.2 + 1e-9
    if push:
        assert any(history[n].strength > history[n - 1].strength for n in moves)


def test_validation_loss_vetoes():
    """The loss rises with the zeros; above the tolerance the strength only falls."""
    controller = Target(0.5, steps=200, tolerance=0.1)
    history = simulated(
        controller, push=0.5, weights=separated(), loss=lambda step, zero: 2.4 + 2 * zero
    )
    strengths = [state.strength for state, _ in history]
    first = next(n for n, (_, zero) in enumerate(history) if 2 * zero > 0.1)
    assert first < 150
    after = strengths[first + controller.patience :]
    assert after == sorted(after, reverse=True) and after[-1] < after[0] / 2
    free = simulated(replace(controller, tolerance=10), push=0.5, weights=separated(),
                     loss=lambda step, zero: 2.4 + 2 * zero)  # fmt: skip
    assert history[-1][1] < free[-1][1] - 0.1


def test_a_validation_loss_that_is_not_finite_vetoes():
    controller = Target(0.5, steps=100, patience=1)
    state = controller.after(State(1.0), Seen(2.0, 0.0, needed=0.1, validation=2.0))
    state = State(1.0, lowest=2.0)
    for loss in (math.nan, math.inf):
        after = controller.after(state, Seen(2.0, 0.0, needed=9.0, validation=loss))
        assert after.strength == pytest.approx(1 / 1.15)
        assert State.from_json(after.to_json()) == after


def test_the_strength_waits_for_a_validation_loss_before_it_rises():
    controller = Target(0.5, steps=100, patience=3)
    state = controller.begin(1.0)
    for _ in range(10):
        state = controller.after(state, Seen(2.0, 0.0, needed=5.0))
        assert state.strength == 1.0
    state = controller.after(state, Seen(2.0, 0.0, needed=5.0, validation=2.0))
    assert state.strength == 1.15 and state.considered == 11
    eager = replace(controller, tolerance=None)
    state = eager.begin(1.0)
    for _ in range(3):
        state = eager.after(state, Seen(2.0, 0.0, needed=5.0))
    assert state.strength == 1.15


def test_ahead_of_the_schedule_the_strength_does_not_rise():
    controller = Target(0.5, steps=100, patience=1)
    assert controller.wanted(0) == 0 and controller.wanted(100) == 0.5 == controller.wanted(120)
    assert controller.wanted(50) == 0.5 * (1 - 0.5**3)
    state = controller.begin(1.0)
    seen = Seen(2.0, zero=0.1, needed=5.0, validation=2.0)
    assert controller.after(state, seen).strength == 1.0
    assert controller.after(state, replace(seen, zero=0.0)).strength == 1.15


def test_needed_strength_by_hand():
    norms = {"a": torch.tensor([0.0, 4.0, 6.0]), "b": torch.tensor([8.0])}
    weights = {"a": torch.tensor([0.0, 1.0, 2.0]), "b": torch.tensor([0.0])}
    # Units need 0, 4 and 3; the last has no weight.
    values = [needed_strength(norms, weights, share=s, learning=0.5) for s in (0, 0.25, 0.5, 0.75)]
    assert values == [0, 0, 6, 8]
    assert needed_strength(norms, weights, share=0.5, learning=0) == math.inf
    with pytest.raises(TargetOutOfReach, match=r"target 0.9 is above 0\.7500"):
        needed_strength(norms, weights, share=0.9, learning=0.5)


def test_needed_strength_takes_a_model_exactly_there():
    model = tiny("llama")
    groups, params = find_groups(model), dict(model.named_parameters())
    weights = unit_weights(groups, params)
    strength = needed_strength(
        unit_norms(groups, params), weights, share=0.25, learning=10 * LR
    )
    for n in range(10):
        assert zero_share(unit_norms(groups, params)) < 0.25, n
        proximal_step(groups, params, weights, LR * strength * (1 + 1e-6))
    assert zero_share(zero_groups(groups, params)) == 0.25


# Fixed and driven by the loss ---------------------------------------------------------------------


def test_fixed_is_fixed():
    assert {state.strength for state, _ in simulated(Fixed(3.0))} == {3.0}


def test_loss_driven_by_hand():
    controller = LossDriven(1.0, every=2, warmup=4, smooth=0.5, raise_by=1.5, lower_by=0.5)
    state, strengths = controller.begin(), []
    for loss in (4.0, 2.0, 3.0, 3.0, 3.0, 3.0, 1.0, 1.0, 3.0, 3.0, 9.0, 9.0):
        state = controller.after(state, Seen(loss))
        strengths.append(state.strength)
    # Means of the first ten: 3 after six (the first look), 20/8 after eight, 26/10 after ten.
    assert strengths == [1.0] * 7 + [1.5] * 2 + [0.75] * 2 + [0.375]
    assert state.smoothed == pytest.approx((2.6 + 9) / 4 + 9 / 2)


def test_loss_driven_takes_a_loss_that_is_not_finite_for_risen():
    controller = LossDriven(1.0, every=1, warmup=0)
    state = controller.after(controller.begin(), Seen(2.0))
    state = controller.after(state, Seen(math.nan))
    assert state.strength == 0.6 and state.smoothed == 2.0
    assert controller.after(state, Seen(1.0)).strength == pytest.approx(0.66)


# State --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("controller", [Fixed(0.3), LossDriven(0.3, every=3, warmup=5, smooth=0.9),
                                        Target(0.5, steps=60, patience=4)])  # fmt: skip
@pytest.mark.parametrize("at", [0, 1, 17, 40])
def test_a_state_read_back_decides_alike(controller, at):
    g = torch.Generator().manual_seed(at)
    seen = [
        Seen(*torch.rand(3, generator=g).tolist(), validation=None if n % 3 else 1 + n / 700)
        for n in range(60)
    ]
    straight = stopped = controller.begin(0.7)
    for n, s in enumerate(seen):
        if n == at:
            stopped = State.from_json(stopped.to_json())
        straight, stopped = controller.after(straight, s), controller.after(stopped, s)
        assert straight == stopped
    assert straight.steps == 60


def test_a_damaged_state_is_refused():
    whole = State(1.0).to_json()
    for text in (whole[:-3], "[1]", json.dumps({"strength": 1.0})):
        with pytest.raises(BadInput, match="state of the strength"):
            State.from_json(text)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: Fixed(-1), "strength must be finite and at least 0, got -1"),
        (lambda: Fixed(math.nan), "strength must be finite and at least 0, got nan"),
        (lambda: LossDriven(-0.1), "strength must be finite and at least 0, got -0.1"),
        (lambda: LossDriven(1, smooth=1), "smooth must be at least 0 and below 1, got 1"),
        (lambda: LossDriven(1, lower_by=1.1), "lower_by must be above 0 and at most 1, got 1.1"),
        (lambda: LossDriven(1, every=0), "every must be finite and at least 1, got 0"),
        (lambda: Target(1.0, steps=9), "target must be at least 0 and below 1, got 1.0"),
        (lambda: Target(-0.1, steps=9), "target must be at least 0 and below 1, got -0.1"),
        (lambda: Target(math.nan, steps=9), "target must be at least 0 and below 1, got nan"),
        (lambda: Target(0.5, steps=0), "steps must be finite and at least 1, got 0"),
        (lambda: Target(0.5, steps=9, bound=0.9), "bound must be finite and at least 1, got 0.9"),
        (lambda: Target(0.5, steps=9, tolerance=-1), "tolerance must be finite and at least 0"),
        (lambda: Shrinking(0), "steps must be finite and at least 1, got 0"),
        (lambda: Shrinking(9, window=0), "window must be finite and at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(make, rule):
    with pytest.raises(BadInput) as told:
        make()
    assert rule in str(told.value)


def test_all_problems_of_a_setting_are_told_at_once():
    with pytest.raises(BadInput, match="penalty: 3 problems"):
        Target(2.0, steps=0, bound=0.5)


# Shrinking ----------------------------------------------------------------------------------------


def test_shrinking_by_hand():
    places = {"g": torch.tensor([0.25, 0.5, 1.0, math.inf])}
    timetable = Shrinking(8, window=3, power=1)
    found = [timetable.factors(places, step)["g"].tolist() for step in range(1, 10)]
    third, half = pytest.approx(2 / 3), 0.5
    assert [f[0] for f in found] == [half] + [0.0] * 8  # due at step 2
    assert [f[1] for f in found] == [1, third, half] + [0] * 6
    assert [f[2] for f in found] == [1, 1, 1, 1, 1, third, half, 0, 0]
    assert {f[3] for f in found} == {1.0}


@pytest.mark.parametrize("power", [1, 3])
@pytest.mark.parametrize(("steps", "window"), [(1, 1), (10, 4), (37, 100)])
def test_shrinking_ends_in_the_decision_exactly(steps, window, power):
    """Whatever training does to the units on the way, and on schedule all along."""
    model = tiny("llama")
    groups, params = find_groups(model), dict(model.named_parameters())
    keep = uneven(groups)
    g = torch.Generator().manual_seed(5)
    scores = {x.name: torch.rand(x.size, generator=g) for x in groups}
    places = removal_places(groups, keep, scores)
    timetable = Shrinking(steps, window=window, power=power)
    removed = sum(int((~k).sum()) for k in keep.values())
    untouched = {name: n[keep[name]] for name, n in unit_norms(groups, params).items()}
    for step in range(1, steps + 1):
        if step % 2:
            units.mask(model, groups, units.keep_all(groups))
            for p in params.values():
                p.data.mul_(1.01)
        scale_units(groups, params, timetable.factors(places, step))
        zero = sum(int((n == 0).sum()) for n in unit_norms(groups, params).values())
        share = 1 - (1 - step / steps) ** power
        # Groups round down, each to a unit.
        assert share * removed - len(groups) <= zero <= share * removed + 1e-6
    found = zero_groups(groups, params)
    assert all(torch.equal(found[name], keep[name]) for name in keep)
    grown = 1.01 ** -(-steps // 2)
    for name, n in unit_norms(groups, params).items():
        torch.testing.assert_close(n[keep[name]], untouched[name] * grown)


def test_a_unit_left_alone_falls_linearly():
    norm, norms = 6.0, []
    place = {"g": torch.tensor([1.0])}
    for step in range(1, 11):
        norm *= Shrinking(10, window=4).factors(place, step)["g"].item()
        norms.append(norm)
    assert norms == pytest.approx([6] * 6 + [4.5, 3, 1.5, 0], abs=1e-6)


def test_removal_places_follow_scores_within_a_decision():
    group = Group("g", "neurons", 5, (), ())
    scores = {"g": torch.tensor([3.0, 0.0, 2.0, 1.0, 9.0])}
    keep = select(scores, [group], sparsity={"neurons": 0.6})
    assert keep["g"].tolist() == [True, False, False, False, True]
    places = removal_places([group], keep, scores)["g"].tolist()
    assert places == pytest.approx([math.inf, 1 / 3, 1, 2 / 3, math.inf])
    same = removal_places([group], {"g": torch.ones(5, dtype=torch.bool)}, scores)["g"]
    assert same.isinf().all()
