"""What units are used for: uses are what units write, and the text that shows it is found."""

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import llm_narrow
from commands import SMALL, refused
from folders import write_domain, write_model
from llm_narrow import checkpoint, explain_form, explain_page, explain_text, explain_use, page
from llm_narrow.blocks import Blocks, hashed, pack
from llm_narrow.depth import carried
from llm_narrow.errors import BadInput
from llm_narrow.explain import explain
from llm_narrow.explain_units import Decided, chosen, decided, named
from llm_narrow.explain_use import STRONGEST, Top, added, measured, rows_of
from llm_narrow.families import find_groups
from llm_narrow.recipe import load
from llm_narrow.units import Group, keep_all
from llm_narrow.vocabulary_rows import MAP, new_ids, read_map
from test_page import EVIL, Outline
from tiny import CONFIGS, FORMS, batch, tiny

FAMILIES = sorted(set(CONFIGS) - {"mlp"})
WORD = " keep"  # what the planted neuron is for
PLANTED = 7


def blocks_of(tokens: Tensor) -> Blocks:
    ids = tokens.int()
    return Blocks(ids, torch.ones_like(ids).short(), torch.zeros_like(ids), hashed(ids))


def model_of(kind: str) -> Any:
    of, changes = FORMS.get(kind, (kind, {}))
    return tiny(of, **changes)


def groups_of(model: Any) -> list[Group]:
    return [g for g in find_groups(model) if g.kind in ("neurons", "heads")]


def given_and_fed(model: Any, name: str, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What a module of the model gives and is fed, (positions, …)."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _, args, output: seen.append((output.clone(), args[0]))  # Falcon adds to it in place
    )
    with torch.no_grad():
        model(tokens)
    handle.remove()
    ((output, fed),) = seen
    return output.reshape(-1, output.shape[-1]), fed.reshape(-1, fed.shape[-1])


@torch.no_grad()
def alone(model: Any, group: Group, unit: int, tokens: Tensor) -> Tensor:
    """The norm of what the reader gives where only one unit is left in it, (positions,)."""
    (s,) = group.reads
    experts = range(model.get_parameter(s.param).shape[0]) if s.dim == 2 else [None]
    total = torch.zeros(tokens.numel())
    for expert in experts:
        twin = copy.deepcopy(model)
        weight, own = twin.get_parameter(s.param), model.get_parameter(s.param)
        begin = s.start + unit * s.block
        weight.zero_()
        if expert is None:
            weight.narrow(s.dim, begin, s.block).copy_(own.narrow(s.dim, begin, s.block))
        else:
            weight[expert, :, begin] = own[expert, :, begin]
        if (bias := getattr(twin.get_submodule(s.module), "bias", None)) is not None:
            bias.zero_()
        total += given_and_fed(twin, s.module, tokens)[0].norm(dim=-1)
    return total


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_the_units_add_is_what_their_reader_gives(kind: str) -> None:
    model, tokens = model_of(kind), batch(kind)
    for g in groups_of(model):
        (s,) = g.reads  # all that `explain` knows of: one reader to a group
        if model.get_parameter(s.param).dim() == 3:
            continue
        output, fed = given_and_fed(model, s.module, tokens)
        rows = rows_of(model, g)
        with torch.no_grad():
            total = sum(added(fed, rows, g, unit) for unit in range(g.size))
            bias = getattr(model.get_submodule(s.module), "bias", None)
            wanted = output if bias is None else output - bias
        assert torch.allclose(total, wanted, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", [*FAMILIES, *sorted(set(FORMS) - set(CONFIGS))])
def test_a_use_is_the_norm_of_what_the_unit_alone_writes(kind: str) -> None:
    """Against a model whose reader has nothing but that unit; totals are sums over what counts."""
    model = model_of(kind)
    tokens = batch(FORMS.get(kind, (kind,))[0])
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[:, 0] = False
    groups = groups_of(model)
    units = [(g, unit) for g in groups for unit in {0, g.size // 2, g.size - 1}]
    found = measured(model, groups, units, blocks_of(tokens), counted, batch_size=1)
    assert found.positions == int(counted.sum()) <= STRONGEST
    for (g, unit), top in zip(units, found.tops, strict=True):
        wanted = alone(model, g, unit, tokens) * counted.flatten()
        atol = 1e-4 * float(wanted.max()) + 1e-6
        used = torch.zeros(tokens.numel())
        used[top.places] = top.uses
        assert torch.allclose(used, wanted, atol=atol)
        assert float(found.totals[g.name][unit]) == pytest.approx(float(wanted.sum()), rel=1e-3)
        assert (top.uses.diff() <= 0).all()


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "phi3", "opt"])
def test_what_a_head_looks_at_is_what_the_model_says(kind: str) -> None:
    model, tokens = tiny(kind), batch(kind)
    before = model.config._attn_implementation
    groups = [g for g in groups_of(model) if g.kind == "heads"]
    units = [(g, unit) for g in groups for unit in range(g.size)]
    counted = torch.ones_like(tokens, dtype=torch.bool)
    found = measured(model, groups, units, blocks_of(tokens), counted)
    assert model.config._attn_implementation == before != "eager"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(tokens, output_attentions=True).attentions
    for (g, unit), top in zip(units, found.tops, strict=True):
        own = weights[groups.index(g)]
        width = own.shape[1] // g.size
        mean = own[:, unit * width : (unit + 1) * width].mean(1)[..., 1:]
        share, place = mean.max(-1)
        assert torch.allclose(share.flatten()[top.places], top.attention, atol=1e-5)
        after = top.places % tokens.shape[1] > 1  # the first has nothing else to look at
        assert after.any()
        assert place.flatten()[top.places][after].add(1).equal(top.attended[after])


def test_long_blocks_leave_attention_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain_use, "LONGEST", 8)
    model, tokens = tiny("llama"), batch("llama")
    (g,) = [g for g in groups_of(model) if g.kind == "heads"][:1]
    every = torch.ones_like(tokens, dtype=torch.bool)
    (top,) = measured(model, [g], [(g, 0)], blocks_of(tokens), every).tops
    assert len(top.places) == tokens.numel() and (top.attended == -1).all()


def test_the_strongest_are_held_and_of_equal_ones_the_first() -> None:
    def top(first: int, uses: list[float]) -> Top:
        places = torch.arange(first, first + len(uses))
        return Top(places, torch.tensor(uses), places * 2, torch.tensor(uses) / 2)

    both = top(0, [3.0, 1.0]).joined(top(10, [3.0, 2.0]))
    assert both.places.tolist() == [0, 10, 11, 1] and both.attended.tolist() == [0, 20, 22, 2]
    assert both.attention.tolist() == [1.5, 1.5, 1.0, 0.5]
    many = top(0, [1.0] * 70).joined(top(70, [1.0] * 70)).joined(top(140, [2.0]))
    assert many.places.tolist() == [140, *range(STRONGEST - 1)]


def test_batches_of_any_size_give_the_same() -> None:
    model, tokens = tiny("llama"), batch("llama", rows=5)
    groups = groups_of(model)
    units = [(g, unit) for g in groups for unit in (0, 1)]
    counted = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    one, other = (
        measured(model, groups, units, blocks_of(tokens), counted, batch_size=n) for n in (1, 4)
    )
    for a, b in zip(one.tops, other.tops, strict=True):
        assert a.places.equal(b.places) and torch.allclose(a.uses, b.uses, rtol=1e-4)
    assert all(torch.allclose(one.totals[n], other.totals[n], rtol=1e-5) for n in one.totals)


# Which units ---------------------------------------------------------------------------------


def known(heads: int = 2, neurons: int = 8, layers: int = 4) -> Decided:
    """Neuron u of layer l is scored 100 l + u; the lower half goes. No head goes."""
    model = tiny("llama", num_hidden_layers=layers, intermediate_size=neurons)
    groups = tuple(groups_of(model))
    scores = {
        g.name: torch.arange(g.size).float() + 100 * int(g.name.split(".")[2]) for g in groups
    }
    keep = keep_all(groups)
    for g in groups:
        if g.kind == "neurons":
            keep[g.name][: g.size // 2] = False
    return Decided(groups, keep, scores)


def test_the_highest_and_lowest_of_each_lot_no_two_of_a_layer() -> None:
    units = chosen(known(), ["neurons"], 5)
    assert [(u.name, u.why, u.kept, u.rank) for u in units] == [
        ("3.neurons.7", "highest-scored kept", True, 1),
        ("2.neurons.7", "highest-scored kept", True, 1),
        ("1.neurons.7", "highest-scored kept", True, 1),
        ("1.neurons.4", "lowest-scored kept", True, 4),
        ("0.neurons.4", "lowest-scored kept", True, 4),
        ("3.neurons.3", "highest-scored removed", False, 5),
        ("2.neurons.3", "highest-scored removed", False, 5),
        ("1.neurons.3", "highest-scored removed", False, 5),
        ("1.neurons.0", "lowest-scored removed", False, 8),
        ("0.neurons.0", "lowest-scored removed", False, 8),
    ]
    assert units[0].score == 307.0


def test_more_than_there_are_layers_and_more_than_there_are() -> None:
    few = known(layers=2)
    assert [u.name for u in chosen(few, ["neurons"], 6)][:6] == [
        "1.neurons.7", "1.neurons.6", "0.neurons.7",
        "1.neurons.4", "0.neurons.5", "0.neurons.4",
    ]  # fmt: skip
    every = [u.name for u in chosen(few, ["neurons"], 100)]
    assert len(every) == len(set(every)) == 16
    assert [u.kept for u in chosen(few, ["heads"], 2)] == [True, True]


def test_units_without_scores_have_to_be_named() -> None:
    bare = Decided(known().groups, known().keep, {})
    with pytest.raises(BadInput, match=r"no scores of its heads.*--scores.*--units.*0\.heads\.0"):
        chosen(bare, ["heads"], 2)
    (unit,) = named(bare, "1.heads.0")
    assert (unit.score, unit.rank, unit.why) == (None, None, "asked for")


def test_units_by_name() -> None:
    found = named(known(), " 3.neurons.5, model.layers.0.self_attn.1,3.neurons.5")
    assert [(u.group.name, u.index, u.name) for u in found] == [
        ("model.layers.3.mlp", 5, "3.neurons.5"), ("model.layers.0.self_attn", 1, "0.heads.1"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("9.neurons.1", "'9.neurons.1' names no unit: write LAYER.KIND.INDEX, as 0.neurons.0; "
                        "there are neurons and heads in layers 0 to 3"),
        ("1.experts.1", "names no unit"),
        ("neurons", "names no unit"),
        ("", "'' names no unit"),
        ("1.heads.x", "names no unit"),
        ("1.heads.-1", "names no unit"),
        ("1.heads.2", "'1.heads.2' is not there: 1.heads has units 0 to 1"),
        ("1.heads.2,8.heads.0,0.heads.0", "--units: 2 problems"),
    ],
)  # fmt: skip
def test_names_that_are_none(asked: str, told: str) -> None:
    with pytest.raises(BadInput) as refusal:
        named(known(), asked)
    assert told in str(refusal.value)


def test_two_groups_of_one_kind_in_a_layer_are_told_apart() -> None:
    groups = tuple(groups_of(tiny("qwen2_moe")))
    both = Decided(groups, keep_all(groups), {})
    with pytest.raises(BadInput, match=r"two groups.*mlp\.experts\.3 or .*mlp\.shared_expert\.3"):
        named(both, "0.neurons.3")
    (unit,) = named(both, "model.layers.0.mlp.shared_expert.3")
    assert unit.name == "model.layers.0.mlp.shared_expert.3"


def written_keep(folder: Path, keep: dict[str, Tensor]) -> Path:
    (folder / "model").mkdir(parents=True)
    save_file(keep, folder / "model" / "keep.safetensors", {"version": "1"})
    return folder


def test_what_stayed_is_told_of_the_model_that_the_run_began_with(tmp_path: Path) -> None:
    """Layers that went whole, in a run that began with an uneven model, whose keep is composed."""
    model = tiny("llama", num_hidden_layers=3, intermediate_size=4)
    groups = groups_of(model)
    model.narrow_keep = {
        g.name: torch.tensor([True, False, True, True, True, False]) for g in groups
        if g.kind == "neurons"
    }  # fmt: skip
    now = keep_all(groups)
    now["model.layers.2.mlp"] = torch.tensor([True, False, True, False])
    whole = {**now}
    for name, before in model.narrow_keep.items():
        whole[name] = before.clone()
        whole[name][before] = now[name]
    layers = torch.tensor([True, False, True])
    stored = carried(whole, layers, "model.layers")
    assert stored["model.layers.1.mlp"].tolist() == [True, False, False, True, False, False]
    found = decided(written_keep(tmp_path / "run", dict(stored)), model, [1], None)
    assert found.keep["model.layers.2.mlp"].tolist() == [True, False, True, False]
    assert found.keep["model.layers.0.mlp"].all() and found.keep["model.layers.0.self_attn"].all()
    for name in ("model.layers.1.mlp", "model.layers.1.self_attn"):
        assert not found.keep[name].any()
    assert found.removed == ("neurons", "heads")


def test_a_keep_or_scores_of_another_model_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    keep = keep_all(groups_of(model))
    run = written_keep(tmp_path / "run", keep)
    save_file({"model.layers.0.mlp": torch.ones(5)}, tmp_path / "s.safetensors")
    with pytest.raises(BadInput, match=r"has 5 scores of model.layers.0.mlp, which has 48 units"):
        decided(run, model, [], tmp_path / "s.safetensors")
    with pytest.raises(BadInput, match="cannot be read as a score file"):
        decided(run, model, [], tmp_path / "none.safetensors")
    other = {**keep, "model.layers.1.mlp": torch.ones(5, dtype=torch.bool)}
    with pytest.raises(BadInput, match=r"another model.*of model.layers.1.mlp it has 5 units.*48"):
        decided(written_keep(tmp_path / "other", other), model, [], None)
    del other["model.layers.1.mlp"]
    with pytest.raises(BadInput, match="it has none units"):
        decided(written_keep(tmp_path / "less", other), model, [], None)


# Text ----------------------------------------------------------------------------------------


def test_three_pieces_are_the_text_and_characters_stay_whole(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    text = "the unit é\n本 code\t"
    ids = tokenizer(text)["input_ids"]
    pieces = [explain_text.cut(tokenizer, ids, at) for at in range(len(ids))]
    assert all("".join(piece) == text for piece in pieces)
    assert all(token and "\ufffd" not in token for _, token, _ in pieces)
    tokens = [token for _, token, _ in pieces]
    assert tokens.count("本") >= 3 and "\n" in tokens  # three bytes, each a token
    assert tokens[0] == "the" and pieces[0][0] == "" and pieces[-1][2] == ""


def test_a_snippet_stays_in_its_document_and_near_or_equal_ones_come_last(
    model_folder: Path,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    words = [tokenizer(f" {word}")["input_ids"][0] for word in ("the", "unit", "keep", "code")]
    ids = torch.tensor([words * 5, words * 2 + words[::-1] * 3], dtype=torch.int32)
    owners = torch.tensor([[0] * 6 + [1] * 14, [1] * 20], dtype=torch.int32)
    blocks = Blocks(ids, torch.ones_like(ids).short(), owners, hashed(ids))
    # The second is near the first; the fourth, 19, comes after the same words as the third, 15.
    places = torch.tensor([6, 7, 15, 19, 30])
    top = Top(places, torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), torch.tensor([2, -1, -1, -1, -1]),
              torch.tensor([0.25, 0.0, 0.0, 0.0, 0.0]))  # fmt: skip
    documents = [llm_narrow.domains.Document(f"p{n}", f"p{n}/\udcff.txt", "") for n in (0, 1)]

    def cut(number: int) -> list[Any]:
        given = {"number": number, "context": 3}
        return list(explain_text.snippets(top, blocks, tokenizer, documents, **given))

    first, second, third = cut(3)
    assert (first.before, first.token, first.after) == ("", " keep", " code the unit")
    assert (first.project, first.path, first.block, first.position) == ("p1", "p1/?.txt", 0, 6)
    assert first.attended == explain_form.Attended(token=" keep", back=4, share=0.25)
    assert (second.block, second.position, second.use) == (0, 15, 3.0)
    assert (third.block, third.position, third.attended) == (1, 10, None)
    assert [s.use for s in cut(9)] == [5.0, 4.0, 3.0, 2.0, 1.0]
    often = explain_text.often(top, blocks, tokenizer)
    assert (often[0].token, often[0].count) == (" code", 3)


def test_small_shares_keep_two_figures() -> None:
    assert [explain_text.part(x) for x in (0.0, 0.00042, 0.01, 0.5)] == [
        "0.0 %", "0.042 %", "1.0 %", "50.0 %",
    ]  # fmt: skip


def test_a_terminal_is_shown_no_controls() -> None:
    text = "a\x1b[31m\n\t\x00\x9b\u202eb"
    assert explain_text.visible(text) == "a\u241b[31m↵\u2409\u2400\ufffd\ufffdb"


# Runs ----------------------------------------------------------------------------------------


def plant(folder: Path) -> Path:
    """Have neuron PLANTED of the first layer fire on the token WORD most, wherever it stands."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (token,) = tokenizer(WORD)["input_ids"]
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.mul_(1e-3)  # so that hardly anything but the token counts
        layer.post_attention_layernorm.weight.fill_(1)
        row = layer.post_attention_layernorm(model.model.embed_tokens.weight[token])
        layer.mlp.gate_proj.weight[PLANTED] = 10 * row
        layer.mlp.up_proj.weight[PLANTED] = row
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(
    domain_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A run that removed neurons and heads of a model with a planted neuron. Do not write to it."""
    folder = tmp_path_factory.mktemp("explained")
    model = plant(write_model(folder / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_NARROW_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("llm_narrow.checkpoint.verify", lambda *args, **given: 0.0)
        patch.setattr("llm_narrow.outcome.draw", lambda *args: None)
        llm_narrow.prune(
            model=str(model), domain=str(domain_folder), length=32, calibration_tokens=512,
            held_out_tokens=256, speed=False, sparsity="neurons=0.5,heads=0.5",
            out=folder / "run",
        )  # fmt: skip
    yield folder / "run"


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place, tmp_path / "run"))


def test_a_planted_neuron_is_found_by_the_text_it_is_for(copied: Path) -> None:
    told = explain(copied, units=f"0.neurons.{PLANTED},0.neurons.{PLANTED + 1}")
    unit, other = told.explanation.units
    assert [s.token for s in unit.snippets] == [WORD] * 5
    assert all(s.token != WORD for s in other.snippets)
    recipe = load(copied / "recipe.yaml")
    domain = llm_narrow.domains.load(recipe.domain.name)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name)
    packed = pack(domain, "calibration", tokenizer, length=32)
    (token,) = tokenizer(WORD)["input_ids"]
    there = int((packed.tokens[:, 1:] == token).sum())
    assert 40 < there < STRONGEST == unit.strongest
    assert (unit.often[0].token, unit.often[0].count) == (WORD, there)
    texts = {d.path: d.text for d in domain.documents["calibration"]}
    for s in unit.snippets:
        assert s.before + s.token + s.after in texts[s.path]
        assert s.use == pytest.approx(unit.snippets[0].use, rel=0.02)
    assert unit.concentration < 1 and 0 < unit.share < 1 and unit.use < unit.snippets[0].use


def test_the_command_tells_what_it_writes(run: Any, copied: Path) -> None:
    done = run("explain", copied, "--tokens", "512", "--each", "3", "--snippets", "2", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found == json.loads((copied / "explain.json").read_text())
    assert sorted(p.name for p in copied.iterdir() if "explain" in p.name) == ["explain.json"]
    assert "llm-narrow report" in done.err
    keep = checkpoint.read_keep(copied / "model" / "keep.safetensors")
    sizes = {"neurons": (96, 48), "heads": (4, 2)}
    assert {x["kind"]: (x["units"], x["removed"]) for x in found["kinds"]} == sizes
    for kind, lot in ((x["kind"], x) for x in found["kinds"]):
        assert 0 < lot["share"] < 1
        mean = sum(x["share"] for x in lot["layers"]) / len(lot["layers"])
        assert lot["share"] == pytest.approx(mean)
        own = [u for u in found["units"] if u["kind"] == kind]
        assert {u["why"] for u in own} == {
            f"{end}-scored {went}" for end in (["highest", "lowest"] if kind == "neurons" else
            ["highest"]) for went in ("kept", "removed")
        }  # fmt: skip
        assert len([u for u in own if not u["kept"]]) == min(3, lot["removed"])
    for u in found["units"]:
        assert u["kept"] == bool(keep[u["group"]][u["index"]])
        assert len(u["snippets"]) == 2 and u["snippets"][0]["use"] >= u["snippets"][1]["use"] > 0
        assert all((s["attended"] is None) == (u["kind"] == "neurons") for s in u["snippets"])
        assert all(s["position"] > 0 for s in u["snippets"])
        assert u["size"] == len(keep[u["group"]]) and 1 <= u["rank"] <= u["size"]
    assert found["tokens"] < 512 and found["documents"] > 1


def test_the_same_call_writes_the_same_bytes(copied: Path) -> None:
    file = copied / "explain.json"
    explain(copied, tokens=512)
    first = file.read_bytes()
    file.unlink()
    explain(copied, tokens=512)
    assert file.read_bytes() == first


def test_separators_and_firsts_do_not_count(copied: Path) -> None:
    told = explain(copied, snippets=STRONGEST, context=0, each=2)
    snippets = [s for unit in told.explanation.units for s in unit.snippets]
    assert len(snippets) > 500
    assert all(s.position and "<end>" not in s.token for s in snippets)
    recipe = load(copied / "recipe.yaml")
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name)
    packed = pack(
        llm_narrow.domains.load(recipe.domain.name), "calibration", tokenizer, length=32
    )
    counted = packed.tokens[:, 1:] != tokenizer.eos_token_id
    assert told.explanation.tokens == int(counted.sum()) < counted.numel()


def test_the_share_of_the_use_that_went(copied: Path) -> None:
    """The planted neuron among the others, by hand: shares of a layer add up to one."""
    every = ",".join(f"0.neurons.{u}" for u in range(48))
    told = explain(copied, units=every, tokens=512, snippets=1)
    assert sum(u.share for u in told.explanation.units) == pytest.approx(1)
    (lot,) = told.explanation.kinds
    gone = sum(u.share for u in told.explanation.units if not u.kept)
    assert lot.layers[0].share == pytest.approx(gone)


def test_tables_on_the_terminal(run: Any, copied: Path) -> None:
    done = run("explain", copied, "--tokens", "512", "--kinds", "heads")
    assert done.code == 0, done.err
    told = " ".join(done.out.split())
    for words in ("2 of 4 heads were removed", "highest-scored kept", "first token of each block",
                  "% of layer's use", "1 of 2 by score", "»"):  # fmt: skip
        assert words in told
    assert "neurons were removed" not in told


def test_the_report_has_it(run: Any, copied: Path) -> None:
    explain(copied, tokens=512, each=2)
    done = run("report", copied)
    assert done.code == 0, done.err
    text = (copied / "report.html").read_text(encoding="utf-8")
    outline = Outline(text)
    assert outline.wrong == [] and outline.open == []
    assert "What units are used for" in outline.text and "#scores-and-kept" in outline.links
    assert "48 of 96 neurons were removed" in outline.text and "<mark>" in text
    assert "tokens back" in outline.text
    md = (copied / "report.md").read_text(encoding="utf-8")
    assert "## What units are used for" in md and "### 0." in md


def test_a_report_without_one_has_no_section(run: Any, copied: Path) -> None:
    assert run("report", copied).code == 0
    assert 'id="explained"' not in (copied / "report.html").read_text(encoding="utf-8")
    assert "used for" not in (copied / "report.md").read_text(encoding="utf-8")


def test_text_of_the_domain_stays_text(copied: Path) -> None:
    harm = EVIL.replace("\ud800", "")
    told = explain(copied, tokens=512, each=1, snippets=1).explanation.model_dump(mode="json")
    for unit in told["units"]:
        unit["often"] = [{"token": harm, "count": 1}]
        unit["snippets"] = [
            {**s, "before": harm, "token": harm, "after": harm, "path": harm, "project": harm,
             "attended": {"token": harm, "back": 1, "share": 0.5}}
            for s in unit["snippets"]
        ]  # fmt: skip
    (copied / "explain.json").write_text(json.dumps({**told, "domain": harm, "notes": [harm]}))
    page.write([copied], copied)
    text = (copied / "report.html").read_text(encoding="utf-8")
    outline = Outline(text)
    assert "window.hacked" in text and "<script>window" not in text and "<img" not in text
    assert outline.wrong == [] and outline.open == []
    assert "{{ 7 * 7 }} &amp;amp;" in text and "\x1b" not in text
    section = explain_page.markdown(explain_form.read(copied)).split("### ", 1)[1]
    for number, part in enumerate(section.split("```")):
        assert number % 2 or "<script>" not in part


def test_a_damaged_file_is_left_out_with_a_warning(copied: Path) -> None:
    for content in ("[]", "{", '{"format": "other"}'):
        (copied / "explain.json").write_text(content)
        found, warnings = explain_page.found(copied)
        assert found is None and "no explanation of this version" in warnings[0]
    written = page.write([copied], copied)
    assert any("no explanation of this version" in w for w in written.warnings)
    assert 'id="explained"' not in written.html.read_text(encoding="utf-8")


def test_a_trimmed_run_is_read_by_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    """The model of the run has other rows; tokens that went are among those that are read."""
    monkeypatch.setattr("llm_narrow.checkpoint.verify", lambda *args, **given: 0.0)
    monkeypatch.setattr("llm_narrow.inputs.fast_bf16", lambda device: False)
    chance = random.Random(0)
    more = " ".join("".join(chance.choices(ascii_lowercase, k=6)) for _ in range(500))
    whole = write_model(tmp_path / "wide", vocabulary=1600, more=more, vocab_size=1600)
    domain = write_domain(tmp_path / "few", files=30)
    done = run("prune", "--model", whole, "--domain", domain, *SMALL, "--no-speed", "--sparsity",
               "0.5", "--vocabulary", "domain", "--vocabulary-threshold", "20",
               "--out", tmp_path / "run")  # fmt: skip
    assert done.code == 0, done.err
    told = explain(tmp_path / "run", tokens=512)
    rows = json.loads((tmp_path / "run/manifest.json").read_text())["vocabulary"]
    (note,) = [n for n in told.explanation.notes if "trimmed the vocabulary" in n]
    assert f"from {rows['rows_before']:,} to {rows['rows']:,} rows" in note and "exact" in note
    assert {u.kind for u in told.explanation.units} == {"neurons"}
    # By hand: the whole model, its own tokenizer, the first calibration blocks.
    model = AutoModelForCausalLM.from_pretrained(whole).eval()
    tokenizer = AutoTokenizer.from_pretrained(whole)
    packed = pack(llm_narrow.domains.load(str(domain)), "calibration", tokenizer, length=32)
    packed = packed.take(512, seed=0)
    assert packed.sha256 == told.explanation.blocks_sha256
    new = new_ids(*read_map(tmp_path / "run" / "model" / MAP))
    assert (new[packed.tokens.long()] < 0).any()
    unit = next(u for u in told.explanation.units if not u.kept)
    snippet = unit.snippets[0]
    _, fed = given_and_fed(model, f"{unit.group}.down_proj", packed.tokens.long())
    column = model.get_submodule(f"{unit.group}.down_proj").weight.detach()[:, unit.index].norm()
    used = fed[:, unit.index].abs() * column
    place = snippet.block * 32 + snippet.position
    assert snippet.use == pytest.approx(float(used[place]), rel=1e-4)


def test_a_run_that_only_trained_is_told_by_the_one_before(
    copied: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_narrow.checkpoint.verify", lambda *args, **given: 0.0)
    after = tmp_path / "after"
    done = run("recover", copied, "--tokens", "256", "--validation-tokens", "128", "--no-speed",
               "--out", after)  # fmt: skip
    assert done.code == 0, done.err
    told = explain(after, tokens=512, each=1)
    direct = explain(copied, tokens=512, each=1)
    assert told.explanation.units == direct.explanation.units
    assert any(f"was made from, {copied}" in note for note in told.explanation.notes)
    assert told.file == after / "explain.json"
    shutil.rmtree(copied)
    with pytest.raises(BadInput, match="is not there any more"):
        explain(after, tokens=512)


def test_fresh_weights_are_refused(copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["compare"] = {"method": "scratch"}
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="fresh weights"):
        explain(copied)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tokens", "16"], "--tokens must be at least 32, one block of the run, got 16"),
        (["--tokens", "many"], "--tokens must be a number of tokens such as 16k, got 'many'"),
        (["--tokens", "0"], "--tokens must be a number of tokens"),
        (["--tokens", "9M"], "9,000,000 tokens were asked for"),
        (["--each", "0"], "--each must be at least 1, got 0"),
        (["--snippets", "0"], "--snippets must be at least 1"),
        (["--context", "-1"], "--context must be at least 0"),
        (["--kinds", "neuron"], "Did you mean 'neurons'"),
        (["--units", "0.neurons.99"], "0.neurons has units 0 to 47"),
        (["--units", "0.heads.0", "--kinds", "heads"], "leave --kinds out"),
        (["--scores", "none.safetensors"], "none.safetensors cannot be read as a score file"),
        (["--whole", "./gone"], "./gone, is not to be had: ./gone does not exist"),
        (["--batch-size", "0"], "--batch-size must be"),
        (["--device", "cuda:9"], "'cuda:9' is not there"),
    ],
)
def test_bad_input(run: Any, copied: Path, arguments: list[str], told: str) -> None:
    refused(run("explain", copied, *arguments), told)
    assert not (copied / "explain.json").exists()


def test_a_folder_that_is_no_run(run: Any, tmp_path: Path) -> None:
    refused(run("explain", tmp_path / "none"), "none is not a finished run folder")


def test_a_whole_model_that_moved(copied: Path, place: Path, tmp_path: Path) -> None:
    recipe = (copied / "recipe.yaml").read_text()
    (copied / "recipe.yaml").write_text(recipe.replace(str(place.parent / "whole"), "/none/there"))
    with pytest.raises(BadInput, match=r"began with, /none/there, is not to be had.*--whole"):
        explain(copied, tokens=512)
    again = explain(copied, tokens=512, each=1, whole=str(place.parent / "whole"))
    assert again.explanation.model == str(place.parent / "whole")
    other = write_model(tmp_path / "other", seed=3)
    with pytest.raises(BadInput, match=r"is not the model that .* began with"):
        explain(copied, tokens=512, whole=str(other))


def test_a_run_that_removed_nothing_of_a_kind(prune: Any, run: Any, tmp_path: Path) -> None:
    assert prune("--sparsity", "0.5").code == 0
    folder = tmp_path / "run"
    refused(run("explain", folder, "--kinds", "heads"), "removed no heads, only neurons")
    told = explain(folder, units="1.heads.0", tokens=512).explanation
    assert (told.units[0].kept, told.kinds[0].removed, told.kinds[0].share) == (True, 0, 0.0)
    assert prune("--sparsity", "0", "--force").code == 0
    refused(run("explain", folder), "removed no neurons or heads")


def test_a_file_is_written_whole_or_not_at_all(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / "explain.json").write_text("earlier")
    really = Path.write_text

    def refuse(self: Path, *args: Any, **given: Any) -> int:
        written = really(self, *args, **given)
        if "explain" in self.name:
            raise PermissionError(13, "Permission denied")
        return written

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(BadInput, match=r"explain\.json cannot be written: Permission denied"):
        explain(copied, tokens=512, each=1)
    assert [p.name for p in copied.iterdir() if "explain" in p.name] == ["explain.json"]
    assert (copied / "explain.json").read_text() == "earlier"


def test_what_else_went_is_told(copied: Path) -> None:
    """Query heads and layers are told in words, and text that changed since."""
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest |= {"query_heads": {"before": 2, "after": 1}}
    manifest["domain"]["sha256"]["calibration"] = "0" * 64
    (copied / "manifest.json").write_text(json.dumps(manifest))
    notes = " ".join(explain(copied, tokens=512, each=1).explanation.notes)
    assert "left 1 of 2 query heads" in notes and "not what it was" in notes


def test_every_flag_arrives(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[Any] = []

    def stop(run: Path, **given: Any) -> None:
        caught.append((run, given))
        raise BadInput("far enough")

    monkeypatch.setattr("llm_narrow.explain.explain", stop)
    line = "explain r --tokens 4k --kinds heads --units 0.heads.1 --each 2 --snippets 3 --context 4 --scores s --whole w --batch-size 8 --device cpu --quiet"  # noqa: E501
    assert "far enough" in run(*line.split()).err
    ((folder, given),) = caught
    assert (folder, given.pop("spell")("batch_size")) == (Path("r"), "--batch-size")
    assert given.pop("console").quiet
    assert given == {
        "tokens": "4k", "kinds": "heads", "units": "0.heads.1", "each": 2, "snippets": 3,
        "context": 4, "scores": Path("s"), "whole": "w", "batch_size": 8, "device": "cpu",
    }  # fmt: skip
