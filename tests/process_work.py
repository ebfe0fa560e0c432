"""What tests/test_processes.py has two processes do, and one for comparison.

As a program it is one of two processes, which torchrun starts three times: `everything` and
`first_again` end by being killed in the middle of a run.
"""

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llm_narrow import losses, processes
from llm_narrow.distill import distill_loss
from llm_narrow.families import find_groups
from llm_narrow.lasso import Proximal
from llm_narrow.lora import with_lora
from llm_narrow.losses import language_loss
from llm_narrow.penalties import unit_weights, weights_from_scores, zero_groups
from llm_narrow.refit import refit_and_remove, statistics
from llm_narrow.scores import CRITERIA, score
from llm_narrow.settings import Settings
from llm_narrow.strength import Target
from llm_narrow.train import Step, Trained, train
from tiny import VOCAB, batch, tiny
from training import text, weights

LENGTH = 9
KILLED = 9  # the step in which runs are killed; there is a state of step 8
DONE = 12  # steps of a run
SETTINGS = Settings(
    tokens=DONE * 8 * LENGTH, lr=3e-3, batch_size=4, accumulation=2, evaluate_every=4, choose="last"
)
GRADIENTS = ("llama", "untied llama", "gpt2", "gemma3_text", "distilled llama")
CASES = ("plain", "lasso", "lora", "checkpointing")
WAYS = ("ddp", "fsdp")


def model(kind: str = "llama", **changes: Any) -> nn.Module:
    """Hidden 64, two layers, and widths that two processes cannot divide evenly."""
    width = {"gpt2": "n_inner"}.get(kind, "intermediate_size")
    return tiny(kind, std=0.1, hidden_size=64, **{width: 67}, **changes)


class Spoils:
    """Makes the weights worse from step 7 on, so that the best are not the last."""

    def __call__(self, given: Any, step: Step) -> dict[str, Any]:
        with torch.no_grad():
            for p in given.parameters():
                p.mul_(1.5 if step.number > 6 else 1)
        return {}


class KilledProximal(Proximal):
    """Kills its process in the middle of a run."""

    def __call__(self, given: Any, step: Step) -> Any:
        if step.number == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(given, step)


def run(case: str, out: Path, *, two: bool, sharded: bool = False, killed: bool = False) -> Trained:
    """A run of one of CASES, with the same data in each step whether one or two take part.

    Leaves its weights, one file per process.
    """
    s = replace(SETTINGS, batch_size=2 if two else 4)
    given: Any = model()
    after: Any = None
    if case == "plain":
        s, after = replace(s, choose="best"), Spoils()
    elif case == "lora":
        given = with_lora(given, rank=2)
    elif case == "checkpointing":
        s = replace(s, checkpointing=True, bf16=True)
    elif case == "lasso":
        groups = find_groups(given)
        first = score(given, groups, [], criterion="magnitude")
        owned = unit_weights(groups, dict(given.named_parameters()))
        chosen = weights_from_scores(
            first, groups, sparsity={"neurons": 0.5, "heads": 0.5}, times=owned
        )
        control = Target(0.3, DONE - 1, patience=2)
        after = (KilledProximal if killed else Proximal)(groups, chosen, control, 0.3)
    seen = set()

    def noted(m: Any, tokens: Tensor) -> Tensor:
        layer, head = m.model.layers[0], m.get_output_embeddings().weight
        seen.add(f"{type(layer).__name__} {head.dtype}")
        return language_loss(m, tokens)

    out.mkdir(parents=True, exist_ok=True)
    done = train(
        given, text(24), loss=noted, settings=s, validation=text(10, seed=9),
        after_step=after, state=out / "state", rows=out / "train.jsonl", sharded=sharded,
        expected_processes=2 if two else None,
    )  # fmt: skip
    assert all(type(p) is nn.Parameter for p in given.parameters())
    assert given.lm_head.weight is given.model.embed_tokens.weight
    mine = processes.rank()
    save_file(_own(weights(given)), out / f"final.{mine}.safetensors")
    told = {**asdict(done), "loss": _validation(given), "seen": sorted(seen)}
    if case == "lasso":
        keep = zero_groups(groups, dict(given.named_parameters()))
        told["zero"] = {name: k.tolist() for name, k in keep.items()}
    (out / f"done.{mine}.json").write_text(json.dumps(told))
    return done


@torch.no_grad()
def _validation(given: Any) -> float:
    """The loss of the model that the caller is left with, computed by itself."""
    blocks = text(10, seed=9)
    total = sum(float(language_loss(given, b)) for b in blocks.batches(2))
    return total / (10 * (LENGTH - 1))


def gradients(case: str) -> dict[str, Tensor]:
    """Of the summed loss of 4 blocks, and the loss itself; sharded where there are two."""
    kind = case.split()[-1]
    changes = {"tie_word_embeddings": False} if case.startswith("untied") else {}
    given = model(kind, **changes)
    loss = language_loss
    if case.startswith("distilled"):
        loss = distill_loss(tiny(kind, seed=5), temperature=2.0)
    tokens = processes.share(batch(kind, rows=4).split(2))
    if processes.count() == 1:
        total = torch.stack([loss(given, b) for b in tokens]).sum()
        total.backward()
        found = {n: p.grad for n, p in given.named_parameters() if p.grad is not None}
        return {"loss": total.detach(), **found}
    before = weights(given)
    device = torch.device("cpu")
    twin = processes.shard(given, loss, device=device, bf16=False)
    assert not any(p.numel() for p in given.parameters())
    total = twin(tokens[0])
    (total * processes.count()).backward()  # FSDP2 takes the mean
    shards = {n: p.grad for n, p in twin.model.named_parameters() if p.grad is not None}
    found = {n: processes.whole(g) for n, g in shards.items()}
    assert all(processes.own(g).numel() < g.numel() for g in shards.values())
    processes.give_back(twin.model, given)
    assert all(p.equal(before[n]) for n, p in given.named_parameters())
    return {"loss": processes.summed(total.detach()), **found}


def scored() -> dict[str, Tensor]:
    """By all criteria, on batches that two processes cannot divide evenly."""
    given = tiny("llama")
    batches = [batch("llama", seed=s) for s in range(3)]
    found = {}
    for criterion in CRITERIA:
        got = score(given, find_groups(given), batches, criterion=criterion)
        found |= {f"{criterion} {name}": s for name, s in got.items()}
    return found


def refitted() -> dict[str, Tensor]:
    """Weights after each kind of refit, and after one with fewer batches than processes."""
    found = {}
    for kind in ("sequential", "one-shot", "known", "one batch"):
        given = tiny("llama", std=0.1)
        groups = find_groups(given)
        keep = {g.name: torch.arange(g.size) % 2 == 0 for g in groups}
        g = torch.Generator().manual_seed(2)
        sizes = [(2, 24)] if kind == "one batch" else [(4, 24), (4, 24), (3, 24)]
        batches = [torch.randint(3, VOCAB, size, generator=g) for size in sizes]
        known = statistics(given, groups, batches) if kind == "known" else None
        facts = refit_and_remove(
            given, groups, keep, [] if known else batches, known=known,
            sequential=kind != "one-shot",
        )  # fmt: skip
        found |= {f"{kind} {name}": p for name, p in weights(given).items()}
        found |= {f"{kind} error {n}": torch.tensor(e) for n, e in facts.errors.items()}
    return found


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().contiguous().clone() for name, t in tensors.items()}


def everything(place: Path) -> None:
    """All runs to their end, gradients, scores and refits; then a run under DDP is killed."""
    for way in WAYS:
        for case in CASES:
            run(case, place / way / case, two=True, sharded=way == "fsdp")
    mine = processes.rank()
    for case in GRADIENTS:
        save_file(_own(gradients(case)), place / f"{case}.{mine}.safetensors")
    save_file(_own(scored()), place / f"scores.{mine}.safetensors")
    save_file(_own(refitted()), place / f"refit.{mine}.safetensors")
    run("lasso", place / "killed-ddp", two=True, killed=True)


def first_again(place: Path) -> None:
    """Go on with the run that was killed; a sharded one is killed."""
    if os.environ["RANK"] == "0":
        shutil.copytree(place / "killed-ddp", place / "other-way")
    run("lasso", place / "killed-ddp", two=True)
    run("lasso", place / "killed-fsdp", two=True, sharded=True, killed=True)


def second_again(place: Path) -> None:
    """Go on with that, and sharded from the state that DDP left."""
    run("lasso", place / "killed-fsdp", two=True, sharded=True)
    run("lasso", place / "other-way", two=True, sharded=True)


PARTS = {f.__name__: f for f in (everything, first_again, second_again)}


def main(part: str, place: Path) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    losses.LEARNT = 5  # several pieces, as in life
    PARTS[part](place)
    # Gloo's threads now and then abort a process that is torn down while the other still talks:
    # wait for each other by file, then leave without teardown, which is not what is tested.
    rank = int(os.environ["RANK"])
    (place / f"over.{rank}").touch()
    deadline = time.monotonic() + 120
    while not (place / f"over.{1 - rank}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
