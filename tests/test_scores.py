"""Scores against what they claim to be: finite differences, hand computation, permutations."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_narrow import scores, units
from llm_narrow.errors import UnknownName
from llm_narrow.families import FAMILIES, find_groups
from llm_narrow.losses import language_loss
from llm_narrow.scores import CRITERIA, score
from tiny import batch, tiny

LANGUAGE_MODELS = sorted(set(FAMILIES) - {"mlp"})


def data(kind: str, n: int = 3) -> list[Tensor]:
    return [batch(kind, seed=s) for s in range(n)]


def square_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def plain_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def loss_of(kind: str) -> scores.Loss:
    return square_loss if kind == "mlp" else language_loss


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_the_chunked_loss_and_its_gradients_are_those_of_the_whole_logits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CHUNK", "FROZEN"):  # several pieces, the last one smaller
        monkeypatch.setattr(f"llm_narrow.losses.{name}", 5)
    a, b = tiny(kind), tiny(kind)
    tokens = batch(kind)
    ours, plain = language_loss(a, tokens), plain_loss(b, tokens)
    torch.testing.assert_close(ours, plain)
    (ours / 7).backward()
    (plain / 7).backward()
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(language_loss(a, tokens), plain.detach())


def test_a_softcap_on_the_logits_is_kept() -> None:
    model = tiny("gemma3_text", final_logit_softcapping=2.0)
    tokens = batch("gemma3_text")
    torch.testing.assert_close(language_loss(model, tokens), plain_loss(model, tokens))


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_the_effect_is_the_derivative_of_the_loss_by_a_gate_on_the_unit(kind: str) -> None:
    """With one sequence per batch, the attribution is |dL / d gate|: checked by differences."""
    model = tiny(kind).double()
    x = batch(kind).double()[:1] if kind == "mlp" else batch(kind)[:1]
    loss = square_loss if kind == "mlp" else plain_loss
    found = score(model, find_groups(model), [x], criterion="attribution", loss=loss)
    params = dict(model.named_parameters())
    step = 3e-3  # RMS norms compute in float32 whatever the model is in
    for g in find_groups(model):
        for unit in (0, g.size - 1):
            change = []
            for sign in (1, -1):
                with torch.no_grad():
                    for s in g.reads:
                        at = units.positions(s, torch.tensor([unit]))
                        old = params[s.param].index_select(s.dim, at)
                        params[s.param].index_copy_(s.dim, at, old * (1 + sign * step))
                    change.append(float(loss(model, x)))
                    for s in g.reads:
                        params[s.param].index_copy_(s.dim, at, old)
            by_difference = abs(change[0] - change[1]) / (2 * step)
            assert float(found[g.name][unit]) == pytest.approx(by_difference, rel=2e-2, abs=2e-2)


def test_the_ways_of_summing_are_told_apart_by_a_unit_whose_effects_cancel() -> None:
    """One hidden unit, two sequences, effects +6 and -6: worked out by hand."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Identity(), nn.Linear(1, 1, bias=False))
    nn.init.constant_(model[0].weight, 2.0)
    nn.init.constant_(model[2].weight, 3.0)
    x = torch.tensor([[1.0], [-1.0]])
    groups = find_groups(model)

    def of(criterion: str) -> float:
        return float(
            score(model, groups, [x], criterion=criterion, loss=lambda m, b: m(b).sum())["0"]
        )

    assert of("attribution") == pytest.approx(12.0)
    assert of("fisher") == pytest.approx(72.0)
    assert of("paper") == pytest.approx(0.0)
    assert of("activation") == pytest.approx(8**0.5)
    assert of("wanda") == pytest.approx(72**0.5)
    assert of("magnitude") == pytest.approx(13**0.5)
    assert of("ablation") == pytest.approx(0.0)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2"])
def test_ablation_is_the_loss_of_the_masked_model(kind: str) -> None:
    model = tiny(kind)
    groups = [g for g in find_groups(model) if g.kind == "heads"]
    found = score(model, groups, data(kind), criterion="ablation")
    g = groups[1]
    masked = copy.deepcopy(model)
    keep = units.keep_all([g])
    keep[g.name][1] = False
    units.mask(masked, [g], keep)
    with torch.no_grad():
        added = sum(float(language_loss(masked, b) - language_loss(model, b)) for b in data(kind))
    assert float(found[g.name][1]) == pytest.approx(added, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"random"}))
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "mlp"])
def test_scores_move_with_the_units(kind: str, criterion: str) -> None:
    """Law 5: units permuted, scores permuted alike."""
    model = tiny(kind)
    before = score(model, find_groups(model), data(kind), criterion=criterion, loss=loss_of(kind))
    g = find_groups(model)[0]
    order = torch.randperm(g.size, generator=torch.Generator().manual_seed(4))
    params = dict(model.named_parameters())
    with torch.no_grad():
        for s in g.slices:
            p = params[s.param]
            moved = p.index_select(s.dim, units.positions(s, order))
            p.index_copy_(s.dim, units.positions(s, torch.arange(g.size)), moved)
    after = score(model, find_groups(model), data(kind), criterion=criterion, loss=loss_of(kind))
    torch.testing.assert_close(after[g.name], before[g.name][order], atol=2e-3, rtol=2e-3)
    for other in find_groups(model)[1:]:
        torch.testing.assert_close(after[other.name], before[other.name], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_scoring_leaves_the_model_as_it_was(criterion: str) -> None:
    model = tiny("llama").train()
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = score(model, find_groups(model), data("llama"), criterion=criterion)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert model.training and not frozen.requires_grad and model.model.norm.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert {n: (s.dtype, s.device.type) for n, s in found.items()} == dict.fromkeys(
        (g.name for g in find_groups(model)), (torch.float32, "cpu")
    )


def test_additive_criteria_add_up_over_data() -> None:
    model = tiny("llama")
    groups = find_groups(model)
    for criterion in ("attribution", "fisher"):
        whole = score(model, groups, data("llama", 4), criterion=criterion)
        parts = [score(model, groups, data("llama", 4)[i::2], criterion=criterion) for i in (0, 1)]
        for name in whole:
            torch.testing.assert_close(whole[name], parts[0][name] + parts[1][name])


def test_random_draws_without_replacement_and_by_the_seed() -> None:
    model = tiny("llama")
    groups = find_groups(model)
    one, same, other = (
        score(model, groups, [], criterion="random", seed=seed) for seed in (0, 0, 1)
    )
    everything = torch.cat(list(one.values()))
    assert len(everything.unique()) == len(everything)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(everything, torch.cat(list(other.values())))


def test_an_unknown_criterion_suggests_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'attribution'"):
        score(tiny("llama"), [], [], criterion="atribution")


def test_a_score_file_gives_back_scores_and_origin(tmp_path: Path) -> None:
    found = {"a": torch.rand(3), "b": torch.rand(5)}
    scores.write(tmp_path / "s.safetensors", found, {"criterion": "fisher", "tokens": 12})
    held, about = scores.read(tmp_path / "s.safetensors")
    assert about == {"criterion": "fisher", "tokens": "12"}
    assert all(torch.equal(held[name], found[name]) for name in found)


def test_overlap_is_the_share_of_kept_units_in_common() -> None:
    model = tiny("llama")
    groups = [g for g in find_groups(model) if g.kind == "heads"]
    a = {g.name: torch.tensor([True, False]) for g in groups}
    b = {groups[0].name: torch.tensor([True, False]), groups[1].name: torch.tensor([False, True])}
    assert scores.overlap(a, b, groups) == {"heads": 0.5}


def test_scoring_keeps_no_graph_alive_between_batches() -> None:
    """A hook that holds its own tensor is a cycle: memory would grow with every batch."""
    import gc
    import weakref

    model = tiny("llama")
    alive: list[weakref.ref[Tensor]] = []

    def noted(m: nn.Module, tokens: Tensor) -> Tensor:
        loss = language_loss(m, tokens)
        alive.append(weakref.ref(loss))
        return loss

    gc.collect()
    gc.disable()
    try:
        inputs: list[weakref.ref[Tensor]] = []
        reader = model.model.layers[1].mlp.down_proj
        hook = reader.register_forward_pre_hook(lambda m, a: inputs.append(weakref.ref(a[0])))
        score(model, find_groups(model), data("llama", 4), loss=noted)
        hook.remove()
        assert len(inputs) == 4
        assert not any(ref() is not None for ref in inputs)
    finally:
        gc.enable()


@pytest.mark.parametrize("criterion", ["attribution", "wanda", "random"])
def test_the_memory_estimate_grows_as_the_work_does(criterion: str) -> None:
    model = tiny("llama")
    groups = find_groups(model)

    def estimate(batch_size: int) -> int:
        return scores.memory_estimate(
            model, groups, batch_size=batch_size, length=64, criterion=criterion
        )

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert estimate(1) >= weights
    assert (estimate(64) > 2 * estimate(1)) == (criterion != "random")
