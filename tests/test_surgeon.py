"""The criterion surgeon against least squares done the long way, and on units that stand in."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_narrow import scores, surgeon
from llm_narrow.errors import BadInput
from llm_narrow.families import find_groups
from llm_narrow.losses import language_loss
from llm_narrow.progress import silent
from llm_narrow.scores import score, score_halves
from tiny import batch, tiny


def quadratic(weight: Tensor, new: Tensor, square: Tensor, metric: Tensor) -> float:
    """tr(F (W - W') A (W - W')'), with weights (inputs, outputs)."""
    change = weight - new
    return float(torch.trace(metric @ change.T @ square @ change))


def refitted(weight: Tensor, square: Tensor, gone: list[int]) -> Tensor:
    """The weights nearest to `weight` in the metric of `square` that are 0 where `gone` says."""
    stay = [i for i in range(len(weight)) if i not in gone]
    new = torch.zeros_like(weight)
    new[stay] = torch.linalg.solve(square[stay][:, stay], square[stay] @ weight)
    return new


def a_case(width: int, out: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    acts = torch.randn(3 * width, width, generator=chance, dtype=torch.float64)
    asked = torch.randn(3 * out, out, generator=chance, dtype=torch.float64)
    weight = torch.randn(width, out, generator=chance, dtype=torch.float64)
    return weight, acts.T @ acts, asked.T @ asked


@pytest.mark.parametrize("block", [1, 2])
def test_costs_are_those_of_least_squares_at_every_turn(block: int) -> None:
    weight, square, metric = a_case(8, 5)
    reader = surgeon._Reader.of(weight, square, metric, block)
    ridge = surgeon.DAMPING * square.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    damped = square + ridge
    left = list(range(8 // block))
    gone: list[int] = []
    spent = 0.0
    for turn in (1, 0, 0):  # places among those that are left
        expected = []
        for unit in left:
            more = [*gone, *range(unit * block, (unit + 1) * block)]
            at = refitted(weight, damped, more)
            expected.append(quadratic(weight, at, damped, metric) - spent)
        torch.testing.assert_close(
            reader.costs(), torch.tensor(expected), rtol=2e-3, atol=1e-3, check_dtype=False
        )
        rest = torch.tensor([i for i in range(len(left)) if i != turn])
        spent += expected[turn]
        unit = left.pop(turn)
        gone += range(unit * block, (unit + 1) * block)
        reader.without(torch.tensor([turn]), rest)


class Doubled(nn.Module):
    """Two layers, the second neuron of which does the same as the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
        with torch.no_grad():
            for p in (self.net[0].weight, self.net[0].bias):
                p[1] = p[0]


def test_a_unit_that_another_stands_in_for_is_cheap_until_that_one_is_gone() -> None:
    net = Doubled().net
    groups = find_groups(net)
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))

    def loss(m: nn.Module, b: Tensor) -> Tensor:
        return F.mse_loss(m(b), b[:, :3], reduction="sum")

    found = score(net, groups, [x], criterion="surgeon", loss=loss)["0"]
    plain = score(net, groups, [x], criterion="attribution", loss=loss)["0"]
    cheap, dear = sorted(found[:2].tolist())
    assert cheap == float(found.min()) and cheap < 0.2 * dear
    assert float(plain[0]) > 0 and float(plain[1]) > 0  # which does not see it


def test_scores_are_nats_over_all_the_tokens() -> None:
    """Twice the text, twice the cost of a unit."""
    model = tiny("llama")
    groups = find_groups(model)
    once = score(model, groups, [batch("llama")], criterion="surgeon")
    twice = score(model, groups, [batch("llama")] * 2, criterion="surgeon")
    for name, found in once.items():
        torch.testing.assert_close(twice[name], 2 * found, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("criterion", ["attribution", "surgeon", "wanda"])
def test_halves_and_the_whole_come_out_as_if_scored_one_by_one(criterion: str) -> None:
    model = tiny("llama")
    groups = find_groups(model)
    halves = ([batch("llama", seed=0)], [batch("llama", seed=1)])
    given = copy.deepcopy(model.state_dict())
    together = score_halves(model, groups, halves, criterion=criterion)
    alone = [
        score(model, groups, part, criterion=criterion)
        for part in ([*halves[0], *halves[1]], *halves)
    ]
    for found, wanted in zip(together, alone, strict=True):
        for g in groups:
            torch.testing.assert_close(found[g.name], wanted[g.name], rtol=1e-3, atol=1e-6)
    assert all(torch.equal(given[name], p) for name, p in model.state_dict().items())


def test_units_in_fused_experts_are_refused_by_name() -> None:
    model = tiny("qwen3_moe")
    with pytest.raises(BadInput, match=r"surgeon needs units .*, and model\."):
        score(model, find_groups(model), [batch("qwen3_moe")], criterion="surgeon")


def test_the_memory_estimate_counts_what_is_summed_up() -> None:
    model = tiny("llama")
    groups = find_groups(model)
    held = scores.Data(model, groups, [batch("llama")], language_loss, 0, silent)
    with scores._frozen(model):
        sums = surgeon.gathered(held)
    assert surgeon.bytes_of_sums(model, groups) == 4 * sum(
        s.numel() for s in sums.values() if s.dim()
    )
    asked = {"batch_size": 1, "length": 8}
    plain, own = (
        scores.memory_estimate(model, groups, criterion=c, **asked)
        for c in ("attribution", "surgeon")
    )
    assert own - plain == 3 * surgeon.bytes_of_sums(model, groups)


def test_a_damaged_matrix_shows_in_its_scores() -> None:
    """`scoring` refuses such scores with the name of the matrix."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    found = score(model, find_groups(model), [batch("llama")], criterion="surgeon")
    assert bool(found["model.layers.1.mlp"].isnan().all())
