"""Every architecture: all kinds at once removed and loaded elsewhere; its page; its experts."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_narrow import channels, checkpoint, queries, units, verify
from llm_narrow.architectures import architecture
from llm_narrow.errors import BadInput
from llm_narrow.families import find_groups, refused_kinds
from llm_narrow.losses import language_loss
from llm_narrow.refit import refit_and_remove
from llm_narrow.scores import CRITERIA, score, watched
from llm_narrow.units import Group, Slice
from llm_narrow.vocabulary_rows import new_rows, remove_rows
from tiny import CONFIGS, FORMS, VOCAB, batch, even, outputs, tiny

ROOT = Path(__file__).parents[1]
MODELS = {kind: (kind, {}) for kind in CONFIGS} | FORMS
LEFT = VOCAB - 5  # tokens that stay
TOKENS = torch.randint(LEFT, (2, 18), generator=torch.Generator().manual_seed(5))
SPARE = [name for name in FORMS if name.endswith("experts to spare")]
# Both have 4 heads of a query each, of a hidden size of 32 that 3 does not divide.
TWO_HEADS = ("deepseek_v2", "deepseek_v3")


def groups_of(model: nn.Module, kind: str) -> list[Group]:
    return [g for g in find_groups(model) if g.kind == kind]


def thin(model: Any, beside: set[str]) -> None:
    """Take out some of everything else that can go, but for layers: test_depth has those."""
    if "vocabulary" in beside:
        remove_rows(model, new_rows(torch.arange(VOCAB) < LEFT, multiple=1))
    if "query heads" in beside:
        groups = queries.groups_of(model)
        last = {g.name: torch.arange(g.size) % queries.per_head(model.config) > 0 for g in groups}
        queries.thin(model, last)
    if "channels" in beside:
        channels.thin(model, torch.arange(model.config.hidden_size) % 2 > 0)


@pytest.fixture(scope="module")
def told(tmp_path_factory: Any) -> dict[str, tuple[Any, verify.Written, set[str], Any]]:
    """Each model with some of everything removed, and what a fresh process says of its folder.

    One process for all, and uniform folders first, since they have to do without llm_narrow.
    """
    place, written = tmp_path_factory.mktemp("folders"), {}
    for number, (name, (kind, changes)) in enumerate(MODELS.items()):
        model = tiny(kind, **changes)
        beside = set(architecture(name, model).beside)
        thin(model, beside)
        groups = find_groups(model)
        keep = even(groups, neurons=16, heads=2 if kind in TWO_HEADS else 1, experts=2)
        original = copy.deepcopy(model.config)
        units.remove(model, groups, keep)
        folder = place / str(number)
        folder.mkdir()
        about = checkpoint.write(
            model, None, folder, original_config=original, groups=groups, keep=keep
        )
        written[name] = (folder, model, about, beside)
    order = sorted(written, key=lambda name: written[name][2].layout != "uniform")
    answers = verify.ask([(written[n][0], written[n][2], False) for n in order], TOKENS)
    return {n: (*written[n][1:], answer) for n, answer in zip(order, answers, strict=True)}


@pytest.mark.parametrize("name", MODELS)
def test_all_kinds_at_once_are_the_same_in_a_fresh_process(told: Any, name: str) -> None:
    """The figure: at most 1e-4 of the largest logit, in float32, from a cache too."""
    model, about, beside, answer = told[name]
    expected = verify._logits(model, TOKENS, torch.float32)
    scale = expected.abs().max()
    assert scale > 0.5
    assert (answer["logits"] - expected).abs().max() / scale <= 1e-4
    assert (answer["cached"] - expected[:, -1]).abs().max() / scale <= 1e-4
    kind, changes = MODELS[name]
    own = architecture(name, tiny(kind, **changes))
    assert {*own.beside} == beside >= {"layers", "vocabulary"}
    whole = all(own.stock.values()) and all(own.beside.values())
    assert about.layout == ("uniform" if whole else "uneven")


def test_the_page_is_the_one_that_the_declarations_make() -> None:
    spec = importlib.util.spec_from_file_location("page", ROOT / "examples/docs/architectures.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    written = (ROOT / "docs" / "architectures.md").read_text("utf-8")
    assert written == script.text(), "run python examples/docs/architectures.py"


@pytest.mark.parametrize("name", MODELS)
def test_a_kind_is_either_declared_or_refused(name: str) -> None:
    kind, changes = MODELS[name]
    model = tiny(kind, **changes)
    refused = refused_kinds(model)
    assert not refused.keys() & {g.kind for g in find_groups(model)}
    assert {"neurons", "heads"} <= refused.keys() | {g.kind for g in find_groups(model)}


# Why a kind is refused: removing it is not what masking it would be -------------------------------


def test_a_norm_over_all_heads_changes_those_that_stay() -> None:
    """OLMo 2 declared as Llama would break the second law: the refusal is not for nothing."""
    model = tiny("olmo2")
    from llm_narrow.families_dense import attention

    groups = [attention(model, f"model.layers.{i}.self_attn") for i in range(2)]
    norms = {"q_norm": 16, "k_norm": 8}
    groups = [
        Group(g.name, g.kind, g.size,
              (*g.writes, *(Slice(f"{g.name}.{n}.weight", 0, 0, b) for n, b in norms.items())),
              g.reads)
        for g in groups
    ]  # fmt: skip
    keep = {g.name: torch.tensor([True, False]) for g in groups}
    masked = copy.deepcopy(model)
    units.mask(masked, groups, keep)
    units.remove(model, groups, keep)
    assert (outputs(model, "olmo2") - outputs(masked, "olmo2")).abs().max() > 1e-3


# Whole experts ------------------------------------------------------------------------------------


def of_spare(name: str, **more: object) -> tuple[nn.Module, str]:
    kind, changes = FORMS[name]
    return tiny(kind, **changes, **more), kind


@pytest.mark.parametrize("name", SPARE)
def test_watching_the_inside_of_experts_changes_nothing(name: str) -> None:
    model, kind = of_spare(name)
    shown: list[tuple[str, tuple[int, ...]]] = []
    groups = [g for g in find_groups(model) if g.reads[0].param.endswith("experts.down_proj")]
    with watched(model, groups, lambda g, s, x: shown.append((g.kind, tuple(x.shape)))):
        inside = outputs(model, kind)
    torch.testing.assert_close(inside, outputs(model, kind), atol=1e-5, rtol=1e-4)
    assert {s for k, s in shown if k == "experts"} == {(18, 6)}
    assert {s[0] for k, s in shown if k == "neurons"} == {36}  # two experts for each of 18 tokens
    assert not any("forward" in vars(layer) for layer in model.modules())


@pytest.mark.parametrize("name", SPARE)
def test_the_effect_of_an_expert_is_the_derivative_by_a_gate_on_it(name: str) -> None:
    model, kind = of_spare(name)
    model.double()
    groups, x = groups_of(model, "experts"), batch(kind)[:1]
    found = score(model, groups, [x])
    params, step = dict(model.named_parameters()), 1e-2  # norms compute in float32
    for g in groups:
        (s,) = g.reads
        for unit in range(g.size):
            losses = []
            for factor in (1 + step, (1 - step) / (1 + step)):
                with torch.no_grad():
                    params[s.param][unit] *= factor
                    losses.append(float(language_loss(model, x)))
            with torch.no_grad():
                params[s.param][unit] /= 1 - step
            by_difference = abs(losses[0] - losses[1]) / (2 * step)
            assert float(found[g.name][unit]) == pytest.approx(by_difference, rel=2e-2, abs=3e-3)


@pytest.mark.parametrize("criterion", sorted({*CRITERIA} - {"surgeon"}))  # which refuses them
def test_every_criterion_scores_experts_and_the_neurons_in_them(criterion: str) -> None:
    model, kind = of_spare("qwen3_moe, experts to spare")
    found = score(model, find_groups(model), [batch(kind)], criterion=criterion)
    for g in find_groups(model):
        assert found[g.name].shape == (g.size,)
        assert bool(found[g.name].isfinite().all()) and len(found[g.name].unique()) > 1


def test_an_expert_that_no_token_is_given_to_matters_to_none() -> None:
    """Its router row far below the others: scores of 0, and nothing lost when it goes."""
    model, kind = of_spare("mixtral, experts to spare")
    groups = groups_of(model, "experts")
    hidden: list[Tensor] = []
    for g in groups:
        router = model.get_submodule(g.name)
        router.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    outputs(model, kind)
    with torch.no_grad():
        for g, h in zip(groups, hidden, strict=True):
            # Away from the mean of what it sees, which all entries of these models share in part.
            direction = h.reshape(-1, h.shape[-1]).mean(0)
            row = model.get_parameter(f"{g.name}.weight")
            seen = h.reshape(-1, h.shape[-1]) @ direction
            row[4] = -1e3 * direction / seen.abs().max()
    before = outputs(model, kind)
    chosen = score(model, groups, [batch(kind)], criterion="activation")
    unused = {g.name: chosen[g.name] == 0 for g in groups}
    assert any(bool(u.any()) for u in unused.values())
    keep = {name: ~u for name, u in unused.items()}
    for g in groups:
        keep[g.name][chosen[g.name].argsort(descending=True)[: g.least]] = True
    units.remove(model, groups, keep)
    torch.testing.assert_close(outputs(model, kind), before, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("name", SPARE)
def test_experts_that_stay_make_up_for_those_that_went(name: str, sequential: bool) -> None:
    """The hidden states come nearer to the whole model's than without a refit. One-shot statistics
    know nothing of the tokens that are now given to another expert."""
    g = torch.Generator().manual_seed(2)
    data = [torch.randint(3, VOCAB, (4, 24), generator=g) for _ in range(12)]

    def error(refit: bool) -> float:
        model, _ = of_spare(name)
        groups = [x for x in find_groups(model) if x.kind != "heads"]
        keep = even(groups, neurons=12, experts=2)
        with torch.no_grad():
            wanted = [model.base_model(b).last_hidden_state for b in data]
            if refit:
                facts = refit_and_remove(model, groups, keep, data, sequential=sequential)
                assert facts.errors.keys() == {s.param for x in groups for s in x.reads}
            else:
                units.remove(model, groups, keep)
            got = [model.base_model(b).last_hidden_state for b in data]
        return sum(float((x - y).square().sum()) for x, y in zip(wanted, got, strict=True))

    assert error(True) < (0.9 if sequential else 0.95) * error(False)


def test_experts_keep_the_number_that_a_token_is_given_to() -> None:
    model, _ = of_spare("mixtral, experts to spare")
    groups = groups_of(model, "experts")
    keep = {g.name: torch.arange(g.size) < 1 for g in groups}
    with pytest.raises(BadInput, match=r"mlp\.gate must keep at least 2 experts, got 1"):
        units.remove(model, groups, keep)


def test_where_a_token_is_given_to_all_experts_none_is_offered() -> None:
    assert not groups_of(tiny("mixtral"), "experts")


def test_experts_cannot_be_masked() -> None:
    model, _ = of_spare("mixtral, experts to spare")
    groups = groups_of(model, "experts")
    keep = {g.name: torch.arange(g.size) < 3 for g in groups}
    with pytest.raises(BadInput, match=r"experts cannot be masked, got model.layers.0.mlp.gate"):
        units.mask(model, groups, keep)


def test_a_width_that_the_usual_product_of_experts_refuses_is_computed_otherwise() -> None:
    """Rows have to be of whole 16 bytes for torch's grouped product."""
    model = tiny("mixtral")
    model.set_experts_implementation("grouped_mm")
    groups = groups_of(model, "neurons")
    keep = {g.name: torch.arange(g.size) < 27 for g in groups}
    masked = copy.deepcopy(model)
    units.mask(masked, groups, keep)
    units.remove(model, groups, keep)
    torch.testing.assert_close(
        outputs(model, "mixtral"), outputs(masked, "mixtral"), atol=1e-5, rtol=1e-4
    )
