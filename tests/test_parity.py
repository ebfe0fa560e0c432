"""The parity experiments: batched against single, cut against removed, runs and resuming."""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from example_modules import opened
from llm_narrow import penalties, plan, refit, scores, units
from llm_narrow import state as states
from llm_narrow.errors import BadInput, UnknownName
from llm_narrow.families import find_groups

M = opened("parity")
task, network, train, ablation, exact = (
    M[name] for name in ("task", "network", "train", "ablation", "exact")
)
TASK = task.Task(3, 8, 2)
CODES = [(0,), (1,), (2,), (0, 1, 2)]
SEEDS = [0, 1, 5]


@pytest.fixture(autouse=True)
def own_randomness() -> Iterator[None]:
    """Nothing here may draw from, or seed, the generators that all share."""
    before = torch.get_rng_state(), random.getstate()
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def nets_of(*hidden: int, seeds: Any = tuple(SEEDS)) -> Any:
    return network.fresh(TASK.inputs, hidden, seeds)


def batch(per_code: int = 8, codes: Any = (tuple(CODES),)) -> Any:
    return task.layout(TASK, codes, per_code)


# The task


def test_words_are_those_of_splitmix64() -> None:
    state = torch.tensor([1234567])[:, None] + torch.arange(1, 6) * task.GOLDEN
    found = [int(word) % (1 << 64) for word in task.scrambled(state)[0]]
    # As its authors' C code gives them for this seed.
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423,
                     4593380528125082431, 16408922859458223821]  # fmt: skip


@pytest.mark.parametrize("bits", [8, 63, 64])
def test_labels_are_parities_by_a_slow_loop(bits: int) -> None:
    wide = task.Task(4, bits, bits // 4)
    codes = [(0,), (3,), (0, 1, 2, 3), (1, 3)]
    asked = task.layout(wide, [codes, codes[::-1]], 5)
    inputs, labels = task.sample(asked, torch.tensor([3, 4]), stream="train", step=7)
    assert inputs.shape == (2, 4 + bits, 20) and labels.shape == (2, 20)
    for n, row in enumerate((codes, codes[::-1])):
        for place in range(20):
            code, one = row[place // 5], [int(x) for x in inputs[n, :, place]]
            assert one[:4] == [int(i in code) for i in range(4)]
            size = bits // 4
            bit = [one[4 + b] for i in code for b in range(i * size, (i + 1) * size)]
            assert int(labels[n, place]) == sum(bit) % 2


def test_samples_are_fair_and_differ_by_seed_stream_and_step() -> None:
    asked = task.layout(TASK, [CODES], 2000)
    first = task.sample(asked, torch.tensor([0, 1]), stream="train", step=0)
    bits = first[0][:, 3:]
    assert float((bits.mean(2) - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(8000)
    centred = (bits - 0.5).transpose(0, 1).flatten(1) * 2
    alike = centred @ centred.T / centred.shape[1] - torch.eye(8)
    assert float(alike.abs().max()) < 5 / math.sqrt(16000)
    assert float((first[1].float().mean() - 0.5).abs()) < 0.02
    assert float((bits[0] == bits[1]).float().mean() - 0.5) < 0.02  # other seeds
    for stream, step in (("train", 1), ("recover", 0)):
        other = task.sample(asked, torch.tensor([0, 1]), stream=stream, step=step)[0][:, 3:]
        assert abs(float((bits == other).float().mean()) - 0.5) < 0.02


def test_a_network_sees_the_same_alone_and_among_others() -> None:
    together = task.sample(batch(), torch.tensor([4, 9]), stream="train", step=2)
    alone = task.sample(batch(), torch.tensor([9]), stream="train", step=2)
    assert together[0][1:].equal(alone[0]) and together[1][1:].equal(alone[1])


@pytest.mark.parametrize(
    ("given", "told"),
    [((0, 8, 2), "subtasks must be at least 1"), ((4, 7, 2), "4 subtasks of 2 bits need 8"),
     ((2, 65, 2), "at most 64, got 65")],
)  # fmt: skip
def test_impossible_tasks_are_refused(given: tuple[int, int, int], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        task.Task(*given)


def test_impossible_layouts_are_refused() -> None:
    with pytest.raises(BadInput, match="equally many codes"):
        task.layout(TASK, [[(0,)], [(0,), (1,)]], 4)
    with pytest.raises(BadInput, match="subtasks 0 to 2"):
        task.layout(TASK, [[(3,)]], 4)
    with pytest.raises(BadInput, match="samples per code"):
        task.layout(TASK, [[(0,)]], 0)


# Networks side by side


def test_fresh_networks_are_those_of_nn_linear() -> None:
    nets = nets_of(5, 4)
    for n, seed in enumerate(SEEDS):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            wanted = nn.Sequential(nn.Linear(11, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(),
                                   nn.Linear(4, 2))  # fmt: skip
        for name, p in wanted.named_parameters():
            assert nets[name][n].equal(p)


def test_batched_logits_are_those_of_vmap_and_of_each_alone() -> None:
    nets = nets_of(5, 4)
    inputs, labels = task.sample(batch(), torch.tensor(SEEDS), stream="train", step=0)
    *_, logits = network.activations(nets, inputs)
    shape = network.one(nets, 0)
    wanted = torch.func.vmap(lambda p, x: torch.func.functional_call(shape, p, (x,)))(
        nets, inputs.transpose(1, 2)
    )
    torch.testing.assert_close(logits.transpose(1, 2), wanted)
    for n in range(3):
        alone = network.one(nets, n)(inputs[n].T)
        torch.testing.assert_close(logits[n].T, alone)
        wanted = F.cross_entropy(alone, labels[n], reduction="none")
        torch.testing.assert_close(network.losses(logits, labels)[n], wanted)
        assert network.right(logits, labels)[n].equal(alone.argmax(1) == labels[n])


@pytest.mark.parametrize("strength", [0.0, 0.01])
def test_batched_training_equals_one_by_one_by_torch_alone(strength: float) -> None:
    nets, asked = nets_of(8, 6), batch()
    settings = train.Settings(60, lr=3e-3, eps=1e-5, strength=strength)
    done = train.train(nets, asked, torch.tensor(SEEDS), settings).nets
    for n, seed in enumerate(SEEDS):
        net = network.one(nets, n)
        params, rows = dict(net.named_parameters()), find_groups(net)
        weights = penalties.unit_weights(rows, params, "one")
        adam = torch.optim.Adam(net.parameters(), lr=3e-3, eps=1e-5)
        for step in range(60):
            inputs, labels = task.sample(asked, torch.tensor([seed]), stream="train", step=step)
            adam.zero_grad()
            F.cross_entropy(net(inputs[0].T), labels[0]).backward()
            penalties.add_gradient(
                penalties.PENALTIES["group_lasso"], strength, rows, params, weights
            )
            adam.step()
        for name, p in params.items():
            assert float((done[name][n] - p.detach()).abs().max()) < 1e-5
        assert float((done["0.weight"][n] - nets["0.weight"][n]).abs().max()) > 1e-3  # it moved


def test_proximal_training_equals_the_library_on_each_network() -> None:
    nets, asked = nets_of(8, 6), batch()
    settings = train.Settings(60, lr=1e-2, strength=1.1, way="proximal")
    done = train.train(nets, asked, torch.tensor(SEEDS), settings).nets
    gone = 0
    for n, seed in enumerate(SEEDS):
        net = network.one(nets, n)
        params, rows = dict(net.named_parameters()), find_groups(net)
        weights = penalties.unit_weights(rows, params, "one")
        adam = torch.optim.Adam(net.parameters(), lr=1e-2)
        for step in range(60):
            inputs, labels = task.sample(asked, torch.tensor([seed]), stream="train", step=step)
            adam.zero_grad()
            F.cross_entropy(net(inputs[0].T), labels[0]).backward()
            adam.step()
            norms = penalties.proximal_step(rows, params, weights, 1e-2 * 1.1)
            alive = {name: norm > 0 for name, norm in norms.items()}
            penalties.hold_zero(adam, rows, params, alive)
        gone += sum(int((~a).sum()) for a in alive.values())
        for name, p in params.items():
            assert float((done[name][n] - p.detach()).abs().max()) < 1e-5
    assert 0 < gone < 3 * 14  # some went, some are left, so both were compared


def test_norms_are_the_library_s() -> None:
    nets = nets_of(5, 4)
    for n in range(3):
        net = network.one(nets, n)
        wanted = penalties.unit_norms(find_groups(net), dict(net.named_parameters()))
        for square, norm in zip(network.squares(nets), wanted.values(), strict=True):
            torch.testing.assert_close(square[n].sqrt(), norm.detach())


KEEPS = [
    [torch.tensor([[1, 0, 1, 0, 1], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0]]).bool(),
     torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()],
]  # fmt: skip


def test_cutting_equals_the_library_s_removal_and_its_mask() -> None:
    nets, (keep,) = nets_of(5, 4), KEEPS
    small = network.removed(nets, keep)
    inputs, _ = task.sample(batch(), torch.tensor(SEEDS), stream="train", step=0)
    assert network.hidden(small) == [5, 4]
    assert network.hidden(network.removed(network.chosen(nets, torch.tensor([0, 2])),
                                          [k[[0, 2]] for k in keep])) == [3, 4]  # fmt: skip
    for n in range(3):
        net, masked = network.one(nets, n), network.one(nets, n)
        rows, decision = find_groups(net), network.decision(nets, keep, n)
        units.remove(net, rows, decision)
        units.mask(masked, rows, decision)
        ours = network.one(small, n, network.widths(keep, n))
        assert [p.shape for p in ours.parameters()] == [p.shape for p in net.parameters()]
        for (_, a), (_, b) in zip(ours.named_parameters(), net.named_parameters(), strict=True):
            assert a.equal(b)
        wanted = net(inputs[n].T)
        torch.testing.assert_close(masked(inputs[n].T), wanted)
        torch.testing.assert_close(network.activations(small, inputs)[-1][n].T, wanted)


def test_training_the_cut_with_zeros_behind_equals_training_what_was_removed() -> None:
    nets, (keep,) = nets_of(5, 4), KEEPS
    settings = train.Settings(40, lr=1e-2)
    both = network.side_by_side([network.removed(nets, keep), nets_of(7, 2, seeds=(8,))])
    assert network.hidden(both) == [7, 4] and len(both["0.bias"]) == 4
    seeds = torch.tensor([*SEEDS, 8])
    done = train.train(both, batch(), seeds, settings).nets
    for n, widths in enumerate([*(network.widths(keep, n) for n in range(3)), [7, 2]]):
        if n < 3:
            net = network.one(nets, n)
            units.remove(net, find_groups(net), network.decision(nets, keep, n))
        else:
            net = network.one(nets_of(7, 2, seeds=(8,)), 0)
        alone = {name: p.detach()[None] for name, p in net.named_parameters()}
        wanted = train.train(alone, batch(), seeds[n : n + 1], settings).nets
        for name, p in network.one(done, n, widths).named_parameters():
            assert float((p.detach() - wanted[name][0]).abs().max()) < 1e-5
        for name, p in done.items():  # and what was zero is zero
            inside = network.one(done, n, widths).get_parameter(name)
            assert int((p[n] != 0).sum()) == int((inside != 0).sum())


def test_a_network_taken_out_can_be_refitted() -> None:
    """The library's other operations work on one network of the batch."""
    nets, asked = nets_of(8, 6), batch(64)
    inputs, _ = task.sample(asked, torch.tensor(SEEDS), stream="score", step=0)
    net = network.one(nets, 1)
    whole = net(inputs[1].T).detach()
    rows = find_groups(net)
    scored = scores.score(net, rows, [], criterion="magnitude")
    keep = plan.select(scored, rows, sparsity={"neurons": 0.5})
    cut = network.one(nets, 1)
    units.remove(cut, rows, keep)
    refit.refit_and_remove(net, rows, keep, [inputs[1].T])
    assert [p.shape for p in net.parameters()] == [p.shape for p in cut.parameters()]
    apart = [float((m(inputs[1].T).detach() - whole).square().mean()) for m in (net, cut)]
    assert apart[0] < apart[1]


# Prices and decisions


def test_prices_are_the_library_s_ablation_scores() -> None:
    nets, asked = nets_of(5, 4), batch(16, [[(0, 1)]])
    found = ablation.prices(nets, asked, torch.tensor(SEEDS), entries=16 * 5 * 3 * 2)
    inputs, labels = task.sample(asked, torch.tensor(SEEDS), stream="score", step=0)

    def loss(model: Any, held: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(held[:, :-1]), held[:, -1].long())

    for n in range(3):
        net = network.one(nets, n)
        held = torch.cat([inputs[n].T, labels[n][:, None].float()], dim=1)
        wanted = scores.score(net, find_groups(net), [held], criterion="ablation", loss=loss)
        for price, score in zip(found, wanted.values(), strict=True):
            torch.testing.assert_close(price[n], score, atol=1e-6, rtol=1e-4)


def test_the_paper_s_decision_is_its_loop() -> None:
    price = [torch.randn(3, 5, generator=torch.Generator().manual_seed(1)),
             torch.randn(3, 4, generator=torch.Generator().manual_seed(2))]  # fmt: skip
    nets = nets_of(5, 4)
    for sparsity in (0.1, 0.5, 0.98):
        (keep,) = ablation.decisions(nets, price, [sparsity], "paper", SEEDS)
        for n in range(3):
            every = [(abs(float(p[n, u])), layer, u)
                     for layer, p in enumerate(price) for u in range(p.shape[1])]  # fmt: skip
            gone = {(layer, u) for _, layer, u in sorted(every)[: int(9 * sparsity)]}
            assert gone == {(layer, u) for layer, stays in enumerate(keep)
                            for u in range(stays.shape[1]) if not stays[n, u]}  # fmt: skip


def test_our_decisions_keep_what_helps_and_never_empty_a_layer() -> None:
    # Units 0 and 1 of the first layer hurt most, all of the second are cheaper than the others.
    price = [torch.tensor([[-9.0, -8.0, 3.0, 4.0, 5.0]]), torch.tensor([[0.1, 0.2, 0.3, 0.4]])]
    nets = nets_of(5, 4, seeds=(0,))
    signed = ablation.decisions(nets, price, [0.3, 0.9], "signed", [0])
    assert signed[0][0].tolist() == [[False, False, True, True, True]]
    assert [int(s.sum()) for s in signed[1]] == [1, 1] or min(
        int(s.sum()) for s in signed[1]
    ) >= 1
    paper = ablation.decisions(nets, price, [0.5], "paper", [0])
    assert paper[0][0].all() and not paper[0][1].any()  # a layer is emptied
    chance = ablation.decisions(nets, price, [0.5], "random", [0])
    again = ablation.decisions(nets, price, [0.5], "random", [0])
    other = ablation.decisions(nets, price, [0.5], "random", [1])
    flat = [torch.cat(keep[0], dim=1) for keep in (chance, again, other)]
    assert flat[0].equal(flat[1]) and not flat[0].equal(flat[2])
    assert int(flat[0].sum()) == 5  # exact in number: nothing is drawn twice


def test_an_emptied_layer_trains_like_one_without_units() -> None:
    nets = network.removed(nets_of(5, 4), [torch.ones(3, 5).bool(), torch.zeros(3, 4).bool()])
    done = train.train(nets, batch(), torch.tensor(SEEDS), train.Settings(5)).nets
    assert network.hidden(done) == [5, 1] and not done["2.weight"].any()
    assert not done["4.bias"].equal(nets["4.bias"])


# Training that is stopped


@pytest.mark.parametrize("way", ["gradient", "proximal"])
def test_resumed_equals_undisturbed(tmp_path: Path, way: Any) -> None:
    settings = train.Settings(45, lr=1e-2, window=10, strength=0.5, way=way)
    given = (nets_of(8, 6), batch(), torch.tensor(SEEDS), settings)
    whole = train.train(*given)

    def stopped(items: Any, what: str, total: Any = None) -> Iterator[Any]:
        for done, item in enumerate(items):
            if done == 17:
                raise KeyboardInterrupt
            yield item

    for _ in range(2):  # after 17 steps and 34
        with pytest.raises(KeyboardInterrupt):
            train.train(*given, state=tmp_path / "s", save_every=-1, track=stopped)
    assert states.latest(tmp_path / "s") in (33, 34)
    done = train.train(*given, state=tmp_path / "s")
    for name, p in whole.nets.items():
        assert p.equal(done.nets[name])
    assert whole.mean.equal(done.mean) and whole.least.equal(done.least)
    assert whole.mean.shape == (5, 3, 4)
    again = train.train(*given, state=tmp_path / "s", track=stopped)  # nothing is left to do
    assert again.nets["0.bias"].equal(done.nets["0.bias"])
    with pytest.raises(BadInput, match=r"lr was 0\.01 and is 0\.1 now"):
        train.train(*given[:3], replace(settings, lr=0.1), state=tmp_path / "s")


def test_curves_are_the_losses_before_each_update() -> None:
    nets, asked, seeds = nets_of(8, 6), batch(), torch.tensor(SEEDS)
    done = train.train(nets, asked, seeds, train.Settings(5, lr=1e-2, window=2))
    seen, now = [], nets
    for step in range(5):
        seen.append(train.measure(now, asked, seeds, stream="train", step=step).loss)
        now = train.train(nets, asked, seeds, train.Settings(step + 1, lr=1e-2, window=2)).nets
    wanted = [torch.stack(seen[a:b]) for a, b in ((0, 2), (2, 4), (4, 5))]
    torch.testing.assert_close(done.mean, torch.stack([w.mean(0) for w in wanted]))
    torch.testing.assert_close(done.least, torch.stack([w.min(0).values for w in wanted]))


@pytest.mark.parametrize(
    ("given", "told"),
    [({"steps": 0}, "steps must be at least 1"), ({"steps": 1, "lr": 0}, "lr must be above 0"),
     ({"steps": 1, "strength": -1}, "strength must be at least 0")],
)  # fmt: skip
def test_impossible_training_is_refused(given: Any, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        train.Settings(**given)


# Statistics


def test_fisher_on_known_tables() -> None:
    assert exact.fisher(3, 4, 1, 4) == pytest.approx(34 / 70)  # Fisher's lady with her tea
    assert exact.fisher(8, 10, 1, 6) == pytest.approx(0.03496503, abs=1e-8)  # as R gives it
    assert exact.fisher(0, 5, 0, 5) == exact.fisher(5, 5, 5, 5) == pytest.approx(1)
    assert exact.fisher(27, 40, 0, 40) == pytest.approx(exact.fisher(0, 40, 27, 40))
    assert exact.fisher(27, 40, 0, 40) < 1e-10 and 0.05 < exact.fisher(27, 40, 19, 40) < 0.2


def test_wilson_interval_and_sign_test_on_known_numbers() -> None:
    found = exact.share(27, 40)
    assert (found["low"], found["high"]) == pytest.approx((0.5202, 0.7992), abs=1e-4)
    assert exact.share(0, 40)["low"] == 0 and exact.share(0, 40)["high"] == pytest.approx(
        0.0876, abs=1e-4
    )
    assert exact.sign_test(9, 10) == pytest.approx(22 / 1024)
    assert exact.sign_test(5, 10) == exact.sign_test(0, 0) == 1


def test_trend_counts_all_orders() -> None:
    assert exact.trend([[1, 2, 3]]) == pytest.approx(1 / 6)
    assert exact.trend([[1, 2, 3]] * 4) == pytest.approx(6**-4)
    assert exact.trend([[3, 2, 1]]) == 1
    assert exact.trend([[1, 1, 2]]) == pytest.approx(2 / 6)  # two of the six orders are alike
    assert exact.rank_correlation([1, 2, 3], [1, 10, 100]) == pytest.approx(1)
    assert exact.rank_correlation([1, 2, 3], [5, 5, 5]) == 0


# The command


def tiny() -> Any:
    p = M["presets"]
    short = train.Settings(40, lr=3e-3, eps=1e-5, window=10)
    again = p.Recovery(train.Settings(20, lr=3e-3, window=10), 16)
    return p.Preset(
        curriculum=p.Curriculum(
            4, p.curriculum_arms(subtasks=2, bits=8, size=1, width=8, wider=12, per_code=16,
                                 training=short, rates=(1e-3,)),
        ),
        pruning=p.Pruning(
            task.Task(4, 6, 1), (0, 1), (2, 3), seeds=2, depth=3, per_code=16,
            training={8: short, 16: short}, sparsities=(0.25, 0.5, 0.9), recovery=again,
            score_samples=50, measured_samples=50,
        ),
        scores_width=8,
        lasso=p.Lasso(
            8, 16,
            {"gradient": replace(short, strength=1e-3),
             "proximal": replace(short, strength=5.0, way="proximal"), "none": short},
            (0.5,), again, (0.5,),
        ),
        timing=p.Timing(turns=1, steps=2), entries=1 << 11,
    )  # fmt: skip


@pytest.fixture
def parity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the command with the tiny preset."""
    run = M["run"]
    monkeypatch.setitem(run.PRESETS, "tiny", tiny)
    monkeypatch.setattr(
        "llm_narrow.paper_toys.keep_freed_memory", lambda: True
    )  # for the process, so not in tests

    def go(*options: str) -> Any:
        run.main(["--preset", "tiny", "--out", str(tmp_path / "out"), "--device", "cpu", *options])
        return json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))

    return go


def without_seconds(found: Any) -> Any:
    """What must not depend on when it was done."""
    if isinstance(found, dict):
        return {k: without_seconds(v) for k, v in found.items()
                if k not in ("seconds", "command")}  # fmt: skip
    return [without_seconds(v) for v in found] if isinstance(found, list) else found


def test_a_run_has_every_experiment_and_repeats_none(
    parity: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = parity()["experiments"]
    assert list(found) == ["timing", "curriculum", "pruning", "scores", "lasso"]
    claims = [key for e in found.values() for key in e["verdict_inputs"]]
    assert claims == ["1", "2", "3", "4", "5", "5 (figures 8 and 9)", "6"]
    for experiment in found.values():
        assert experiment["command"].startswith("python examples/parity/run.py --preset tiny")
        for figure in experiment["figures"]:
            for file in figure["files"]:
                assert (tmp_path / "out" / file).stat().st_size > 1000
    timed = found["timing"]["outcomes"]
    assert timed["largest_difference_of_weights"] < 1e-5
    assert all(len(s) == 1 and s[0] > 0 for s in timed["seconds"].values())
    arms = found["curriculum"]["outcomes"]
    assert len(arms) == 6 and len(found["curriculum"]["tests"]) == 15
    assert arms["broad"]["samples"] == arms["composite only"]["samples"] == 40 * 3 * 16
    assert all(len(arm["learned"]) == len(arm["samples_to_learn"]) == 4 for arm in arms.values())
    rows = found["pruning"]["outcomes"]["8"]["rows"]
    assert len(rows) == 2 * 3 * (2 + 1 + 1 + 1)
    wanted = {"paper": [12, 8, 2], "signed": [12, 8, 2], "random": [12, 8, 2]}
    for way, counts in wanted.items():
        left = {sum(r["left"]) for r in rows if r["way"] == way}
        assert sorted(left, reverse=True) == counts
    lasso = found["lasso"]["outcomes"]
    assert min(lasso["proximal"]["zero_share"]) > 0 == max(lasso["gradient"]["zero_share"])
    assert {r["way"] for r in lasso["none"]["longer"]} == {"none", "fresh"}
    before = (tmp_path / "out" / "results.json").read_bytes()
    monkeypatch.setattr(train._Run, "advance", None)  # no step may be taken
    parity()
    assert (tmp_path / "out" / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("experiment", "save_every", "stops"),
    [("curriculum", "-1", [70, 33]), ("pruning", "60", [60, 50, 45])],
)
def test_a_run_that_is_stopped_goes_on_to_the_same_numbers(
    parity: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    experiment: str, save_every: str, stops: list[int],
) -> None:  # fmt: skip
    names = ("--only", experiment, "--save-every", save_every)
    whole = without_seconds(parity("--only", experiment)["experiments"])
    (tmp_path / "out").rename(tmp_path / "whole")
    true_advance, left = train._Run.advance, stops.copy()

    def advance(self: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        true_advance(self)

    while left:
        monkeypatch.setattr(train._Run, "advance", advance)
        with pytest.raises(KeyboardInterrupt):
            parity(*names)
        left.pop(0)
    monkeypatch.setattr(train._Run, "advance", true_advance)
    assert without_seconds(parity(*names)["experiments"]) == whole


def test_only_runs_what_it_names(parity: Any) -> None:
    assert list(parity("--only", "timing")["experiments"]) == ["timing"]


def test_bad_input_is_told(parity: Any, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'pruning'"):
        parity("--only", "prunning")
    with pytest.raises(UnknownName, match=r"preset 'tiney'.*Did you mean 'tiny'"):
        parity("--preset", "tiney")
    with pytest.raises(BadInput, match="--threads must be at least 1"):
        parity("--threads", "0")
    with pytest.raises(BadInput, match="--device cuda:99 cannot be used"):
        parity("--device", "cuda:99")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(BadInput, match=r"holds thesis\.txt and no results\.json"):
        parity()
    (tmp_path / "out" / "thesis.txt").unlink()
    parity("--only", "timing")
    with pytest.raises(BadInput, match="is of preset tiny"):
        M["run"].main(["--preset", "quick", "--out", str(tmp_path / "out")])
    (tmp_path / "out" / "results.json").write_text('{"format": 1')
    with pytest.raises(BadInput, match=r"results\.json cannot be used"):
        parity()


def test_paper_and_quick_are_what_they_say() -> None:
    paper, quick = (M["presets"].PRESETS[name]() for name in ("paper", "quick"))
    broad, narrow, *_ = paper.curriculum.arms
    assert (broad.parameters, broad.samples, narrow.samples) == (25602, 2 * 10**9, 2 * 10**9)
    assert [a.parameters for a in paper.curriculum.arms[-2:]] == [9090, 25633]
    assert len(paper.pruning.sparsities) == 98
    assert quick.curriculum.seeds == paper.curriculum.seeds == 40
    assert {a.samples for a in quick.curriculum.arms} == {quick.curriculum.arms[0].samples}
    deep, *_, wide = quick.curriculum.arms
    assert abs(deep.parameters / wide.parameters - 1) < 0.03
