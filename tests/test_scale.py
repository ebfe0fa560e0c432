"""The plan for larger models: its formulas against real tensors, its page against its script."""

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from llm_narrow import cost, recipe, scores
from llm_narrow.distill import cached_teacher
from llm_narrow.families import find_groups
from llm_narrow.lora import with_lora
from llm_narrow.losses import language_loss
from llm_narrow.refit import statistics
from llm_narrow.settings import Settings
from llm_narrow.startup import adamw
from llm_narrow.train import train
from llm_narrow.units import keep_all, removed
from tiny import tiny
from training import small, text

ROOT = Path(__file__).resolve().parent.parent
PAGE, SLURM = ROOT / "docs" / "scale.md", ROOT / "examples" / "scale" / "slurm.sh"


@pytest.fixture
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "examples" / "scale")
    import arithmetic

    return arithmetic


@pytest.fixture
def plan(arithmetic: Any) -> Any:
    import plan

    return plan


@pytest.fixture
def shape(arithmetic: Any) -> Any:
    return arithmetic.Shape("small", "made up", 64, 160, 3, 4, 2, 256)


def real(shape: Any) -> Any:
    """A model of the shape with real weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(shape.config())


def size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_parameters_are_those_that_transformers_builds(arithmetic: Any) -> None:
    for shape in arithmetic.MODELS:
        for s in (shape, shape.narrowed(0.5)):
            model = s.on_meta()
            assert {p.device.type for p in model.parameters()} == {"meta"}
            found = cost.size(model)
            assert found.parameters == s.parameters
            assert found.without_embeddings == s.layers * s.layer + s.hidden
        assert shape.narrowed(0.5).neurons * 2 == shape.neurons


@pytest.mark.parametrize("tied", [False, True])
def test_training_holds_the_bytes_planned(arithmetic: Any, plan: Any, tied: bool) -> None:
    shape = arithmetic.Shape("small", "made up", 64, 160, 3, 4, 2, 256, tied)
    model = real(shape).train()
    params = dict(model.named_parameters())
    optimizer = adamw(params, Settings(tokens=1))
    language_loss(model, torch.arange(18).view(2, 9)).backward()
    optimizer.step()
    remembered = [t for state in optimizer.state.values() for t in state.values()]
    o = plan.parse([])
    parts = arithmetic.train("lasso", shape, 1, o).parts
    assert size(params.values()) == parts["weights"]
    assert size(p.grad for p in params.values()) == parts["gradients"]
    assert size(t for t in remembered if t.dim()) == parts["moments"]
    assert size(t for t in remembered if not t.dim()) == 4 * len(params)  # counts of steps
    for name in ("weights", "gradients", "moments"):
        assert arithmetic.train("lasso", shape, 8, o).parts[name] == parts[name] / 8


def kept_for_backward(model: Any, run: Callable[[], object]) -> int:
    """Bytes of the storages that autograd holds, the model's own apart."""
    own = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr() for t in own}
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        place = t.untyped_storage().data_ptr()
        if place not in storages:
            found[place] = t.detach()  # held, or its place would be used again
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(t.untyped_storage().nbytes() for t in found.values())


@pytest.mark.parametrize(
    ("how", "checkpointing"),
    [("float32", False), ("autocast", False), ("bfloat16", False), ("scoring", False),
     ("scoring32", False), ("autocast", True), ("bfloat16", True)],
)  # fmt: skip
def test_a_layer_keeps_the_bytes_planned(shape: Any, how: str, checkpointing: bool) -> None:
    tokens = torch.arange(64).view(2, 32)
    frozen = how.startswith("scoring")
    kept = []
    for layers in (3, 4):
        model = real(replace(shape, layers=layers)).train(not frozen)
        if how in ("bfloat16", "scoring"):
            model = model.bfloat16()
        if checkpointing:
            model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )

        def run(model: Any = model) -> object:
            if frozen:
                return scores.score(model, find_groups(model), [tokens])
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                return language_loss(model, tokens)

        kept.append(kept_for_backward(model, run))
    of_layer = kept[1] - kept[0]
    if checkpointing:
        assert of_layer == tokens.numel() * shape.hidden * (2 if how == "bfloat16" else 4)
        return
    if how == "autocast":  # the bfloat16 copies of the weights, planned for apart
        of_layer -= 2 * (shape.layer - 2 * shape.hidden)
    if frozen:  # what scoring itself holds of each neuron
        of_layer += tokens.numel() * shape.neurons * (2 if how == "scoring" else 4)
    assert of_layer == tokens.numel() * shape.saved(how)


def test_lora_adds_the_parameters_planned(shape: Any) -> None:
    model = with_lora(real(shape), rank=4)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == shape.lora(4)


def test_refit_holds_the_statistics_planned(arithmetic: Any, plan: Any, shape: Any) -> None:
    model = real(shape)
    groups = [g for g in find_groups(model) if g.kind == "neurons"]
    keep = keep_all(groups)
    for k in keep.values():
        k[::2] = False
    fits = statistics(model, groups, [torch.arange(18).view(2, 9)], gone=removed(groups, keep))
    o = plan.parse(["--sparsity", "0.5"])
    held = sum(size((fit.square, fit.cross)) for fit in fits)
    assert held == arithmetic.refit(shape, 1, o, sequential=False).parts["statistics"]
    one = arithmetic.refit(shape, 1, o, sequential=True).parts["statistics"]
    assert held == shape.layers * one


def test_a_cached_teacher_takes_the_bytes_planned(arithmetic: Any, tmp_path: Path) -> None:
    blocks = text(20)
    cached_teacher(tiny("llama"), blocks, tmp_path, k=8)
    held = sum(size(load_file(f).values()) for f in tmp_path.glob("*.safetensors"))
    tokens, length = blocks.tokens.numel(), blocks.tokens.shape[1]
    assert held == arithmetic.cache_bytes(tokens, length, 8)


def test_a_state_takes_the_bytes_planned(arithmetic: Any, tmp_path: Path) -> None:
    model = small(tie_word_embeddings=False)
    count = sum(p.numel() for p in model.parameters())
    settings = Settings(tokens=3 * 36, lr=1e-9, evaluate_every=1, schedule="constant", warmup=0)
    train(model, text(8), loss=language_loss, settings=settings, validation=text(4, seed=9),
          state=tmp_path, trackers=())  # fmt: skip
    newest = sorted(tmp_path.glob("step-*"))[-1]
    held = {f.stem: size(t for t in load_file(f).values() if t.dim())
            for f in newest.glob("*.safetensors")}  # fmt: skip
    now, best = arithmetic.state_bytes(count)
    assert held["model"] + held["optimizer"] == now
    assert held.get("best", best) == best


def test_operations_are_those_that_torch_counts(arithmetic: Any, plan: Any, shape: Any) -> None:
    model = real(shape).train()
    model.set_attn_implementation("eager")
    tokens = torch.arange(64).view(2, 32)

    def loss(model: Any, tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def counted(run: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    with torch.no_grad():
        forward = counted(lambda: loss(model, tokens))
    assert counted(lambda: loss(model, tokens).backward()) / forward == pytest.approx(3, rel=0.01)
    groups = find_groups(model)
    scored = counted(lambda: scores.score(model, groups, [tokens], loss=loss))
    assert scored / forward == pytest.approx(2, rel=0.05)  # the first layer ends early
    every, head = arithmetic.operations(shape, 32)
    assert every == pytest.approx(cost.flops_per_token(model, context=0) + 16.5 * 4 * 64 * 3)
    assert head == 2 * 256 * 64
    o = plan.parse(["--no-checkpointing", "--train-tokens", "1000", "--length", "32"])
    done = arithmetic.train("lasso", shape, 8, o).seconds * 8 * o.peak * o.mfu
    assert done == pytest.approx(3 * every * 1000)
    o.checkpointing = True
    again = arithmetic.train("lasso", shape, 8, o).seconds * 8 * o.peak * o.mfu
    assert again == pytest.approx((4 * every - head) * 1000)


def test_traffic_by_hand(arithmetic: Any, plan: Any, shape: Any) -> None:
    o = plan.parse(["--train-tokens", "12800", "--length", "32", "--batch-size", "5"])
    stage = arithmetic.train("lasso", shape, 8, o)
    assert stage.micro_batches == 12800 / (8 * 5 * 32)
    assert stage.received == stage.micro_batches * (2 + 2 + 4) * shape.parameters * 7 / 8
    assert arithmetic.train("lasso", shape, 1, o).received == 0


def test_page_and_tables_are_what_the_script_writes(
    plan: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "scale.md"
    empty = re.sub(r"(<!-- plan: \w+ -->\n)[^<]+", r"\1", PAGE.read_text("utf-8"))
    page.write_text(empty, "utf-8")
    plan.main(["--out", str(tmp_path / "made"), "--page", str(page)])
    how = "Run: python examples/scale/plan.py --out docs/bench/scale --page docs/scale.md"
    assert page.read_text("utf-8") == PAGE.read_text("utf-8"), how
    for end in (".md", ".json"):
        kept = ROOT / "docs" / "bench" / f"scale{end}"
        assert (tmp_path / f"made{end}").read_text("utf-8") == kept.read_text("utf-8"), how
    assert capsys.readouterr().out.strip() in (tmp_path / "made.md").read_text("utf-8")


def test_a_page_without_a_place_for_a_table_is_refused(plan: Any) -> None:
    assert plan.filled("<!-- plan: a -->\nold\n<!-- end -->", {"a": "new\n"}) == (
        "<!-- plan: a -->\nnew\n<!-- end -->"
    )
    with pytest.raises(SystemExit, match="0 places for the table 'b'"):
        plan.filled("<!-- plan: a -->\n<!-- end -->", {"b": "new\n"})


def test_what_does_not_fit_is_crossed(plan: Any, arithmetic: Any) -> None:
    shape = arithmetic.MODELS[0]
    needed = arithmetic.train("lasso", shape, 8, plan.parse([])).total
    for room, cell in ((1.01, f"| {plan.gb(needed)} |"), (0.99, f"| {plan.gb(needed)} ✗ |")):
        o = plan.parse(["--usable", "1", "--memory", str(needed * room)])
        assert cell in plan.stages_table(shape, o)


def test_what_the_page_says_is_possible_fits(plan: Any) -> None:
    found: dict[tuple[str, int], set[str]] = {}
    for row in plan.facts(plan.parse([]))["rows"]:
        missing = found.setdefault((row["model"], row["gpus"]), set())
        missing |= set() if row["fits"] else {row["stage"]}
    full = {"lasso", "lasso, teacher", "recover, full", "recover, full, teacher",
            "recover, full, cached teacher"}  # fmt: skip
    assert found["Llama-3.1-8B", 1] == full
    assert found["Llama-3.1-8B", 8] == found["Llama-3.1-8B", 64] == {"lasso, teacher"}
    refits = {"score", "refit, one-shot", "refit, sequential"}
    assert found["Llama-3.1-70B", 64] == full | refits | {"recover, LoRA"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [(["--sparsity", "1.5"], "below 1"), (["--mfu", "2"], "at most 1"),
     (["--length", "2.5"], "whole number"), (["--memory", "0"], "above 0")],
)  # fmt: skip
def test_wrong_options_are_refused(
    plan: Any, flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        plan.parse(flags)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def asked(command: str) -> recipe.Recipe:
    """What a command line of llm-narrow asks for; its flags have to be known and valid."""
    words = shlex.split(command)
    given: dict[str, object] = {}
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            name = word.removeprefix("--").replace("-", "_")
            value = name.partition("no_")[2] if name.startswith("no_") else name
            given[value] = value == name if after.startswith("--") else yaml.safe_load(after)
    return recipe.load(None, {k: v for k, v in given.items() if k not in ("out", "scores")})


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    return [line for line in lines if re.search(r"llm.narrow (prune|score)", line)]


def test_commands_of_the_page_are_valid_and_as_planned(plan: Any) -> None:
    o = plan.parse([])
    assert len(commands()) == 4
    for command in commands():
        launcher, _, own = command.partition(" llm_narrow ")
        made = asked(own or command)
        assert made.blocks.length == o.length and made.score.tokens == o.calibration_tokens
        if " score " in command:
            assert made.blocks.batch_size == o.score_batch
            continue
        gpus = 8 if own else 1
        assert not own or re.search(r"--(num_processes|nproc-per-node) 8", launcher)
        assert made.train.sharded == (gpus > 1) and made.train.checkpointing
        step = gpus * made.train.accumulation * made.blocks.batch_size * made.blocks.length
        assert step == o.tokens_per_step
        assert made.recover.tokens == o.train_tokens


@pytest.fixture
def cluster(tmp_path: Path) -> Any:
    """Runs slurm.sh among stand-ins for srun and scontrol, which note how they were called."""
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    calls = tmp_path / "calls"
    calls.touch()
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, does in (
        ("srun", 'if [ "$SRUN" = hang ]; then exec sleep 30; else exit "$SRUN"; fi'),
        ("scontrol", 'if [ "$1" = show ]; then printf "n1\\nn2\\n"; else kill "$(cat srun)"; fi'),
    ):
        note = f'echo $$ > {name}\nprintf "%s\\n" "{name} $*" >> {calls}\n'
        (commands / name).write_text(f"#!/bin/bash\ncd {tmp_path}\n{note}{does}\n")
        (commands / name).chmod(0o755)

    def begin(srun: str, *more: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "SRUN": srun,
            "SLURM_JOB_ID": "70001", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
        }  # fmt: skip
        command = ["bash", str(SLURM), "m", "python", str(tmp_path / "out"), *more]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe)

    return begin, lambda: calls.read_text().splitlines()


def test_slurm_script_is_valid() -> None:
    for checker in (["bash", "-n"], ["shellcheck"]):
        if shutil.which(checker[0]):
            done = subprocess.run([*checker, str(SLURM)], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    directives = re.findall(r"^#SBATCH (\S+)", SLURM.read_text(), re.MULTILINE)
    assert "--requeue" in directives and "--open-mode=append" in directives


def test_slurm_script_starts_one_torchrun_a_node_with_valid_flags(cluster: Any) -> None:
    begin, noted = cluster
    job = begin("0", "--damping", "0.02")
    job.communicate(timeout=20)
    assert job.returncode == 0
    shown, started = noted()
    assert shown == "scontrol show hostnames n[1-2]"
    launcher, _, own = started.partition(" llm_narrow ")
    for flag in ("--nnodes 2", "--nproc-per-node 8", "--rdzv-endpoint n1:30001"):
        assert flag in launcher
    made = asked(own)
    assert (made.train.accumulation, made.train.sharded, made.prune.damping) == (4, True, 0.02)


def test_slurm_script_queues_itself_again_before_the_time_is_up(cluster: Any) -> None:
    begin, noted = cluster
    job = begin("hang")
    until = time.monotonic() + 20
    while len(noted()) < 2 and time.monotonic() < until:  # until srun was called
        time.sleep(0.05)
    job.send_signal(10)  # SIGUSR1
    out, err = job.communicate(timeout=20)
    assert noted()[-1] == "scontrol requeue 70001", out + err
    assert job.returncode != 0  # ended by Slurm, here by its stand-in


def test_slurm_script_ends_after_an_error_or_the_end(cluster: Any, tmp_path: Path) -> None:
    begin, noted = cluster
    job = begin("137")
    job.communicate(timeout=20)
    assert job.returncode == 137 and len(noted()) == 2
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").touch()
    job = begin("137")
    out, _ = job.communicate(timeout=20)
    assert job.returncode == 0 and "is finished" in out and len(noted()) == 2
