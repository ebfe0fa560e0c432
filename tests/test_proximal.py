"""The proximal step, what keeps its zeros zero, and what it is for; sharded or not."""

import copy
import os
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

from llm_narrow import units
from llm_narrow.families import FAMILIES, find_groups
from llm_narrow.penalties import (
    PENALTIES,
    add_gradient,
    hold_zero,
    over_shards,
    proximal_step,
    scale_units,
    unit_norms,
    unit_weights,
    zero_groups,
    zero_share,
)
from llm_narrow.scores import watched
from tiny import batch, outputs, parts, tiny, two_units, uneven

every_family = pytest.mark.parametrize("kind", FAMILIES)


def test_proximal_step_by_hand():
    groups, params = two_units()
    after = proximal_step(groups, params, {"g": torch.tensor([2.0, 1.0])}, 1.3)
    # 1 - 2.6 / 5 = 0.48 and 1 - 1.3 / 13 = 0.9
    torch.testing.assert_close(params["in"].detach(), torch.tensor([[1.44, 0], [0, 10.8]]))
    torch.testing.assert_close(params["out"].detach(), torch.tensor([[1.92, 4.5]]))
    torch.testing.assert_close(after["g"], torch.tensor([2.4, 11.7]))
    after = proximal_step(groups, params, {"g": torch.tensor([2.0, 1.0])}, 1.3)
    assert after["g"][0] == 0
    assert not params["in"][0].any() and params["out"][0, 0] == 0
    assert params["in"].requires_grad and params["in"].grad is None
    # Zeros stay, and the rest goes on.
    assert proximal_step(groups, params, {"g": torch.ones(2)}, 1.0)["g"][0] == 0
    torch.testing.assert_close(unit_norms(groups, params)["g"], torch.tensor([0, 9.4]))


def test_proximal_step_is_the_minimiser():
    """Of ||x - v||^2 / 2 + t ||x||, found by descent from v."""
    groups, params = two_units()
    v = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    x = v.clone().requires_grad_()
    for _ in range(400):
        (g,) = torch.autograd.grad((x - v).square().sum() / 2 + 1.7 * x.norm(), x)
        x = (x - 0.1 * g).detach().requires_grad_()
    proximal_step(groups, params, {"g": torch.ones(2)}, 1.7)
    found = torch.cat([params["in"][0], params["out"][:, 0]]).double()
    torch.testing.assert_close(found, x.detach(), atol=1e-6, rtol=1e-6)


@every_family
def test_proximal_step_is_that_of_each_unit_alone(kind):
    """By unit_rows, for families whose groups do not share a matrix; for the MLP both factors."""
    model, groups, params = parts(kind)
    before = copy.deepcopy(model)
    old, weights = dict(before.named_parameters()), unit_weights(groups, params, "one")
    norms = {g.name: units.norms(g, old).detach() for g in groups}
    amount = torch.cat(list(norms.values())).median().item() / 2
    after = proximal_step(groups, params, weights, amount)
    expected = {path: p.detach().clone() for path, p in old.items()}
    for g in groups:
        factor = (1 - amount / norms[g.name]).clamp_min(0)
        for s in g.slices:
            home = units.positions(s, torch.arange(g.size))
            shape = [1] * expected[s.param].dim()
            shape[s.dim] = -1
            part = expected[s.param].index_select(s.dim, home)
            part = part * factor.repeat_interleave(s.block).view(shape)
            expected[s.param].index_copy_(s.dim, home, part)
        if kind != "mlp":
            torch.testing.assert_close(after[g.name], unit_norms(groups, params)[g.name])
    for path, p in params.items():
        torch.testing.assert_close(p.detach(), expected[path], msg=path)
    assert not all(torch.equal(p, old[path]) for path, p in params.items())


def test_units_that_share_a_matrix():
    """The order of groups does not matter, either owner's zero is a zero, and the distance from the
    exact proximal point of the sum (found by descent) falls with the square of the amount."""
    first, groups, params = parts("mlp")
    weights = unit_weights(groups, params)
    second = copy.deepcopy(first)
    proximal_step(groups, params, weights, 0.05)
    proximal_step(groups[::-1], dict(second.named_parameters()), weights, 0.05)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=0)

    distance = []
    for amount in (0.02, 0.01):
        model = tiny("mlp").double()
        v = {path: p.detach().clone() for path, p in model.named_parameters()}
        x = {path: p.clone().requires_grad_() for path, p in v.items()}
        optimizer = torch.optim.SGD(x.values(), lr=0.2)
        for _ in range(120):
            optimizer.zero_grad()
            away = sum((x[k] - v[k]).square().sum() / 2 for k in x)
            lasso = PENALTIES["group_lasso"](groups, x, weights)
            (away + amount * lasso).backward()
            optimizer.step()
        step = {path: p.clone() for path, p in v.items()}
        proximal_step(groups, step, weights, amount)
        distance.append(sum((step[k] - x[k]).square().sum() for k in x).sqrt().item())
    assert 3.5 < distance[0] / distance[1] < 4.5

    shared = params["2.weight"]
    scale_units(groups, params, {"0": (torch.arange(10) != 4).float(), "2": torch.ones(12)})
    assert not shared[:, 4].any() and shared[:, 3].any()


def test_zero_groups_looks_at_entries_not_at_norms():
    groups, params = two_units()
    with torch.no_grad():
        params["in"][0], params["out"][0, 0] = torch.tensor([1e-30, 0]), 0
    assert unit_norms(groups, params)["g"][0] == 0
    assert zero_groups(groups, params)["g"].tolist() == [True, True]
    params["in"].data[0] = 0
    keep = zero_groups(groups, params)
    assert keep["g"].tolist() == [False, True]
    assert zero_share(keep) == 0.5 == zero_share(unit_norms(groups, params))
    scale_units(groups, params, {"g": torch.zeros(2)})
    assert zero_groups(groups, params)["g"].tolist() == [True, False]  # no layer of width 0


@every_family
def test_units_that_the_step_made_zero_can_be_removed(kind):
    """What they give is exactly nothing; the rest differs by the order of sums (test_laws.py)."""
    model, groups, params = parts(kind)
    chosen = uneven(groups)
    weights = {g.name: (~chosen[g.name]).float() for g in groups}
    for _ in range(12):
        proximal_step(groups, params, weights, 1.5)
    keep = zero_groups(groups, params)
    assert all(torch.equal(keep[name], chosen[name]) for name in keep)
    contributions = []

    def note(g, s, x):
        gone = units.positions(s, (~keep[g.name]).nonzero().flatten())
        read = params[s.param].movedim(s.dim, 0)[gone]
        contributions.append(x[..., gone] @ read.reshape(len(gone), -1))

    with watched(model, groups, note):
        whole = outputs(model, kind)
    assert len(contributions) == len(groups) and not any(c.any() for c in contributions)
    units.remove(model, groups, keep)
    assert (outputs(model, kind) - whole).abs().max() / whole.abs().max() <= 1e-6


# After the zeros ----------------------------------------------------------------------------------


def train_on(model: nn.Module, kind: str, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = batch(kind, seed=seed)
    loss = F.mse_loss(model(x), torch.ones(5, 3)) if kind == "mlp" else model(x, labels=x).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def zeroed(kind: str):
    """A model some steps into training with AdamW, a few units of which were just made zero."""
    model, groups, params = parts(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for step in range(5):
        train_on(model, kind, optimizer, step)
    keep = uneven(groups)
    scale_units(groups, params, {name: k.float() for name, k in keep.items()})
    return model, groups, params, optimizer, keep


def gone(groups, params, keep) -> Tensor:
    """The norms of the units that were made zero."""
    norms = unit_norms(groups, params)
    return torch.cat([norms[g.name][~keep[g.name]] for g in groups])


@every_family
def test_stale_moments_move_units_of_zeros(kind):
    """That is why `hold_zero` exists: a gradient of exactly zero is not enough."""
    model, groups, params, optimizer, keep = zeroed(kind)
    train_on(model, kind, optimizer, 9)
    if kind != "mlp":
        for g in groups:
            for s in g.slices:
                rows = units.unit_rows(params[s.param].grad, s, g.size)
                assert not rows[~keep[g.name]].any()
    assert (gone(groups, params, keep) > 0).any()


@every_family
def test_held_units_stay_zero(kind):
    """By themselves after one call where the activation is 0 at 0; else by a call every step."""
    model, groups, params, optimizer, keep = zeroed(kind)
    hold_zero(optimizer, groups, params, keep)
    before = {path: p.detach().clone() for path, p in params.items()}
    for step in range(9, 13):
        train_on(model, kind, optimizer, step)
        if kind == "mlp":
            assert (gone(groups, params, keep) > 0).any()
            hold_zero(optimizer, groups, params, keep)
        assert not gone(groups, params, keep).any()
    assert not any(torch.equal(p, before[path]) for path, p in params.items())


def test_hold_zero_forgets_nothing_of_other_units():
    _, groups, params, optimizer, keep = zeroed("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    stays = keep["model.layers.0.mlp"]
    before = copy.deepcopy(optimizer.state[params[name]])
    hold_zero(optimizer, groups, params, keep)
    after = optimizer.state[params[name]]
    assert after["step"] == before["step"]
    for moment in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[moment][:, stays], before[moment][:, stays])
        assert before[moment][:, ~stays].any() and not after[moment][:, ~stays].any()


@pytest.mark.parametrize(("strength", "back"), [(1.5, False), (0.1, True)])
def test_the_step_alone_holds_zeros_only_if_strong(strength, back):
    model, groups, params, optimizer, keep = zeroed("llama")
    weights = unit_weights(groups, params)
    train_on(model, "llama", optimizer, 9)
    proximal_step(groups, params, weights, 1e-3 * strength)
    norms = gone(groups, params, keep)
    assert bool(norms.any()) == back


# What it is for -----------------------------------------------------------------------------------


class Net(nn.Module):
    """One hidden layer of ReLU, whose first three neurons are what made the data."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.hidden, self.out = nn.Linear(6, 15), nn.Linear(15, 2)
        with torch.no_grad():
            self.out.weight[:, 3:] *= 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x).relu())


@pytest.mark.parametrize(
    ("optimizer", "lr", "strength", "spare"), [("SGD", 0.05, 0.2, 0), ("AdamW", 0.01, 0.5, 2)]
)
def test_group_lasso_finds_the_neurons_that_made_the_data(optimizer, lr, strength, spare):
    """Exactly under SGD. AdamW takes steps of one size however small the gradient, so that the
    step minimises no stated objective, and now and then a neuron stays that need not."""
    model = Net()
    groups, params = find_groups(model), dict(model.named_parameters())
    with torch.no_grad():
        model.hidden.weight[:3] = 2 * torch.eye(6)[:3]
        model.out.weight[:, :3] = torch.tensor([[2.0, 0, -1], [0, 2, 1]])
        teacher = copy.deepcopy(model)
        teacher.out.weight[:, 3:] = 0
    learner = getattr(torch.optim, optimizer)(model.parameters(), lr=lr, weight_decay=0)
    weights = unit_weights(groups, params, "one")
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(0))
    y = teacher(x).detach()
    for step in range(400):
        learner.param_groups[0]["lr"] = lr * (1 - step / 400)
        learner.zero_grad()
        F.mse_loss(model(x), y).backward()
        learner.step()
        proximal_step(groups, params, weights, lr * (1 - step / 400) * strength)
    keep = zero_groups(groups, params)["hidden"]
    assert keep[:3].all() and keep[3:].sum() <= spare
    assert F.mse_loss(model(x), y) < 0.02 * y.var()


# Sharded ------------------------------------------------------------------------------------------


def narrow_shards(rank: int, store: str, expected: dict[str, dict[str, Tensor]]) -> None:
    """One of two processes: the same steps on parameters that FSDP2 shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = tiny("llama", num_hidden_layers=1, intermediate_size=33)
    groups = find_groups(model)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.model.layers[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    params = dict(model.named_parameters())
    found = steps(groups, params, torch.optim.AdamW(model.parameters()), over_shards(params))
    for what, values in found.items():
        for name, value in values.items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            torch.testing.assert_close(whole, expected[what][name], msg=f"{what} {name}")
            assert torch.equal(whole == 0, expected[what][name] == 0), (what, name)
    # Gloo's threads now and then abort a process that is torn down while the other still talks:
    # wait for each other by file, then leave without teardown, which is not what is tested.
    Path(f"{store}.done{rank}").touch()
    deadline = time.monotonic() + 60
    while not Path(f"{store}.done{1 - rank}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os._exit(0)


def steps(groups, params, optimizer, reduce) -> dict[str, dict[str, Tensor]]:
    """Gradients by closed form, two proximal steps between optimizer steps, zeros held."""
    weights = unit_weights(groups, params)
    for chosen in PENALTIES.values():
        add_gradient(chosen, 0.3, groups, params, weights, reduce=reduce)
    grads = {name: p.grad.detach().clone() for name, p in params.items() if p.grad is not None}
    optimizer.step()
    norms = unit_norms(groups, params, reduce=reduce)
    amount = torch.cat([norms[g.name] / weights[g.name] for g in groups]).median().item()
    norms = proximal_step(groups, params, weights, amount, reduce=reduce)
    keep = zero_groups(groups, params, reduce=reduce)
    hold_zero(optimizer, groups, params, keep)
    moments = {name: optimizer.state[p]["exp_avg"] for name, p in params.items() if p in
               optimizer.state}  # fmt: skip
    return {
        "gradients": grads,
        "moments": moments,
        "norms": norms,
        "keep": keep,
        "params": {name: p.detach() for name, p in params.items()},
    }


def test_two_processes_on_shards_do_as_one(tmp_path):
    """A width of 33, and heads whose rows lie on both: shards cut units through."""
    model, groups, params = parts("llama", num_hidden_layers=1, intermediate_size=33)
    assert over_shards(params) is None
    expected = steps(groups, params, torch.optim.AdamW(model.parameters()), None)
    assert 0.2 < zero_share(expected["keep"]) < 0.8
    mp.spawn(narrow_shards, (str(tmp_path / "store"), expected), nprocs=2)


def test_the_step_holds_no_graph_and_copies_one_slice_at_most():
    """Peak of what is allocated at a time: below two slices beyond the model itself."""
    _, groups, params = parts("llama")
    weights = unit_weights(groups, params)
    seen: list[int] = []
    widest = max(p.numel() for p in params.values())

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out._base is None:
                seen.append(out.numel())
            return out

    with Count():
        proximal_step(groups, params, weights, 1e-3)
    assert max(seen) <= widest
