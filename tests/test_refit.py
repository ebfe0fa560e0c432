"""What is removed and can be made up for is made up for, on every declared architecture."""

import copy

import pytest
import torch
from torch import Tensor, nn

from llm_narrow import units
from llm_narrow.errors import BadInput
from llm_narrow.families import FAMILIES, find_groups
from llm_narrow.refit import Against, refit_and_remove
from tiny import VOCAB, batch, tiny
from tiny import outputs as logits

LANGUAGE_MODELS = sorted(set(FAMILIES) - {"mlp"})


def blocks(kind: str, n: int = 16) -> list[Tensor]:
    if kind == "mlp":
        g = torch.Generator().manual_seed(2)
        return list(torch.randn(n, 40, 6, generator=g))
    g = torch.Generator().manual_seed(2)
    sizes = [(4, 24)] * (n - 1) + [(3, 24)]  # the last batch of a run is often smaller
    return [torch.randint(3, VOCAB, size, generator=g) for size in sizes]


@torch.no_grad()
def twins(model: nn.Module, kind: str) -> units.Keep:
    """Make the last unit of every group do exactly what the first does; drop the last."""
    params = dict(model.named_parameters())
    keep = {}
    for g in find_groups(model):
        for s in g.writes:
            first, last = (units.positions(s, torch.tensor([u])) for u in (0, g.size - 1))
            params[s.param].index_copy_(s.dim, last, params[s.param].index_select(s.dim, first))
        keep[g.name] = torch.ones(g.size, dtype=torch.bool)
        keep[g.name][-1] = False
    return keep


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_twin_is_removed_for_nothing(kind: str, sequential: bool) -> None:
    """The unit that stays takes over what its twin did, so the function stays as it was."""
    model = tiny(kind).double()
    keep = twins(model, kind)
    before = logits(model, kind) if kind != "mlp" else model(batch(kind).double())
    bare = copy.deepcopy(model)
    units.remove(bare, find_groups(bare), keep)
    facts = refit_and_remove(
        model,
        find_groups(model),
        keep,
        [b.double() if kind == "mlp" else b for b in blocks(kind)],
        damping=1e-7,
        sequential=sequential,
    )
    after = logits(model, kind) if kind != "mlp" else model(batch(kind).double())
    without = logits(bare, kind) if kind != "mlp" else bare(batch(kind).double())
    scale = before.abs().max()
    assert (after - before).abs().max() / scale < 5e-3
    assert (without - before).abs().max() / scale > 2e-2  # else this shows nothing
    assert all(error < 1e-4 for error in facts.errors.values())
    assert facts.errors.keys() == {s.param for g in find_groups(bare) for s in g.reads}


def test_the_solution_is_the_ridge_regression_worked_out_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(1, 50, 3, dtype=torch.float64)
    a = model[1](model[0](x))[0].detach()  # (50, 4)
    weight = model[2].weight.detach().clone()
    kept = [0, 1, 3]
    target = a @ weight.T
    gram = a[:, kept].T @ a[:, kept]
    ridge = 0.1 * gram.diagonal().mean()
    wanted = torch.linalg.solve(
        gram + ridge * torch.eye(3, dtype=torch.float64),
        a[:, kept].T @ target + ridge * weight[:, kept].T,
    ).T
    keep = {"0": torch.tensor([True, True, False, True])}
    refit_and_remove(model, find_groups(model), keep, [x], damping=0.1)
    torch.testing.assert_close(model[2].weight, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_sequential_brings_the_stream_back_at_least_as_well_as_one_shot(kind: str) -> None:
    """On the calibration blocks, the last hidden states are nearer to the whole model's."""

    def error(sequential: bool | None) -> float:
        model = tiny(kind)
        groups = [g for g in find_groups(model) if g.kind == "neurons"]
        g = torch.Generator().manual_seed(1)
        keep = {x.name: torch.rand(x.size, generator=g) > 0.5 for x in groups}
        data = blocks(kind)
        with torch.no_grad():
            wanted = [model.base_model(b).last_hidden_state for b in data]
            if sequential is None:
                units.remove(model, groups, keep)
            else:
                refit_and_remove(model, groups, keep, data, sequential=sequential)
            got = [model.base_model(b).last_hidden_state for b in data]
        return sum(float((x - y).square().sum()) for x, y in zip(wanted, got, strict=True))

    bare, one_shot, sequential = error(None), error(False), error(True)
    assert one_shot < bare
    assert sequential < 1.02 * one_shot


def test_removing_nothing_changes_nothing_and_reads_nothing() -> None:
    model = tiny("llama")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    groups = find_groups(model)
    facts = refit_and_remove(model, groups, units.keep_all(groups), blocks("llama"))
    assert facts.errors == {}
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_the_passes_may_run_in_bfloat16_over_float32_weights() -> None:
    exact, quick = tiny("llama"), tiny("llama")
    groups = [g for g in find_groups(exact) if g.kind == "neurons"]
    keep = {g.name: torch.arange(g.size) % 2 == 0 for g in groups}
    refit_and_remove(exact, groups, keep, blocks("llama"))
    refit_and_remove(quick, groups, keep, blocks("llama"), dtype=torch.bfloat16)
    assert {p.dtype for p in quick.parameters()} == {torch.float32}
    difference = (logits(exact, "llama") - logits(quick, "llama")).abs().max()
    assert difference / logits(exact, "llama").abs().max() < 0.1


def test_refitting_a_model_in_layers_holds_one_layer_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each layer is solved before the next is looked at."""
    from llm_narrow import refit

    seen: list[tuple[str, str]] = []
    add, write = refit.Fit.add, refit.Fit.write

    def noted_add(fit: refit.Fit, *args: Tensor, **more: bool) -> None:
        seen.append(("add", fit.slice.param))
        add(fit, *args, **more)

    def noted_write(fit: refit.Fit, *args: object) -> float:
        seen.append(("write", fit.slice.param))
        return write(fit, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(refit.Fit, "add", noted_add)
    monkeypatch.setattr(refit.Fit, "write", noted_write)
    model = tiny("llama")
    groups = find_groups(model)
    keep = {g.name: torch.arange(g.size) > 0 for g in groups}
    refit_and_remove(model, groups, keep, blocks("llama", 2))
    expected = [
        f"model.layers.{i}.{reader}.weight"
        for i in (0, 1)
        for reader in ("self_attn.o_proj", "mlp.down_proj")
    ]
    assert [param for what, param in seen if what == "write"] == expected
    assert [what for what, _ in seen] == ["add", "add", "write"] * 4


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mlp"])
def test_statistics_taken_once_serve_any_decision(kind: str) -> None:
    from llm_narrow.refit import statistics

    model = tiny(kind)
    groups = find_groups(model)
    known = statistics(model, groups, blocks(kind))
    for seed in (0, 1):
        g = torch.Generator().manual_seed(seed)
        keep = {x.name: torch.rand(x.size, generator=g) > 0.4 for x in groups}
        for chosen in keep.values():
            chosen[0] = True
        once, again = copy.deepcopy(model), copy.deepcopy(model)
        direct = refit_and_remove(once, groups, keep, blocks(kind), sequential=False)
        taken = refit_and_remove(again, groups, keep, [], known=known)
        assert taken.errors == pytest.approx(direct.errors, rel=1e-3, abs=1e-6)
        torch.testing.assert_close(logits(once, kind), logits(again, kind), atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_text_to_forget_weighs_as_told() -> None:
    """The last layer's reader by hand: what it is fed by the other text is to give nothing."""
    model = tiny("llama").double()
    group = next(g for g in reversed(find_groups(model)) if g.kind == "neurons")
    keep = {group.name: torch.arange(group.size) % 2 == 0}
    own, other = blocks("llama")[:3], blocks("llama")[5:7]
    reader = model.get_submodule(group.reads[0].module)
    seen: list[tuple[Tensor, Tensor]] = []
    reader.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    for b in (*own, *other):
        model(b)
    stay = keep[group.name].nonzero().flatten()
    fed = [a.reshape(-1, a.shape[-1])[:, stay] for a, _ in seen]
    a, f = torch.cat(fed[:3]), torch.cat(fed[3:])
    t = torch.cat([out.reshape(-1, out.shape[-1]) for _, out in seen[:3]])
    w = reader.weight[:, stay].T
    d = 0.01 * (a.T @ a).diagonal().mean()
    pull = 0.7 * len(a) / len(f)
    wanted = torch.linalg.solve(
        a.T @ a + d * torch.eye(len(stay)) + pull * f.T @ f, a.T @ t + d * w
    )
    plain, with_it = copy.deepcopy(model), copy.deepcopy(model)
    refit_and_remove(plain, [group], keep, own)
    refit_and_remove(with_it, [group], keep, own, against=Against(other, 0.7))
    usual, found = (m.get_submodule(group.reads[0].module).weight.T for m in (plain, with_it))
    assert torch.allclose(found, wanted, atol=1e-4)
    assert (f @ found).norm() < 0.8 * (f @ usual).norm()
    none = copy.deepcopy(model)
    refit_and_remove(none, [group], keep, own, against=Against(other, 0.0))
    assert torch.allclose(none.get_submodule(group.reads[0].module).weight.T, usual, atol=1e-6)


@torch.no_grad()
def changes(*, against: Against | None, kind: str = "llama") -> dict[str, float]:
    """How far every reader's weights are from those of a plain refit, relative."""
    made = []
    for one in (None, against):
        model = tiny(kind)
        groups = find_groups(model)
        keep = {g.name: torch.arange(g.size) > 0 for g in groups}
        refit_and_remove(model, groups, keep, blocks(kind)[:4], against=one)
        made.append({s.param: model.get_parameter(s.param) for g in groups for s in g.reads})
    return {name: float((made[1][name] - p).norm() / p.norm()) for name, p in made[0].items()}


def test_every_reader_forgets_in_every_layer() -> None:
    assert min(changes(against=Against(blocks("llama")[5:7], 1.0)).values()) > 0.01


def test_what_cannot_forget_is_refused() -> None:
    with pytest.raises(BadInput, match="router's choice"):
        changes(kind="mixtral", against=Against(blocks("mixtral")[5:7], 1.0))
    model = tiny("llama")
    groups = find_groups(model)
    keep = {g.name: torch.arange(g.size) > 0 for g in groups}
    with pytest.raises(BadInput, match="needs a sequential refit"):
        refit_and_remove(model, groups, keep, blocks("llama")[:2], sequential=False,
                         against=Against(blocks("llama")[5:6], 1.0))  # fmt: skip
