"""How much faster all seeds are side by side than one after the other, timed in turns.

One after the other twice: `plain` is what one would write (an nn.Sequential, torch's Adam as it
comes, cross-entropy, random bits from torch), `same code` is the batched code with one network at
a time, so that only the batching differs. In the same run the weights of both are compared.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from network import fresh, one
from presets import Arm
from task import layout
from torch.nn import functional as F
from train import train

from llm_narrow.paper_toys import Place

WAYS = ("side by side", "same code", "plain")


def run(place: Place) -> dict[str, Any]:
    """Time the broad arm of the curriculum, all its seeds."""
    found = place.part("timing", lambda: part(place))
    return {"seeds": list(range(place.preset.curriculum.seeds)), "outcomes": found, "tests": [],
            "verdict_inputs": {}}  # fmt: skip


def part(place: Place) -> dict[str, Any]:
    """Seconds of each way in each turn, and the ratios of the turns."""
    setting, arm = place.preset.timing, place.preset.curriculum.arms[0]
    ways = {
        "side by side": lambda: batched(place, arm, setting.steps),
        "same code": lambda: singly(place, arm, setting.steps),
        "plain": lambda: plainly(place, arm, setting.steps),
    }
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in place.track(range(setting.turns + 1), "timing", setting.turns + 1):
        for way, go in ways.items():
            taken = timed(go, place.device)
            if turn:  # the first warms up
                seconds[way].append(taken)
    together, alone = ways["side by side"](), ways["same code"]()
    apart = max(float((a - b).abs().max()) for a, b in zip(together, alone, strict=True))
    return {
        "networks": place.preset.curriculum.seeds, "steps": setting.steps,
        "samples_a_step": arm.per_code * len(arm.codes), "parameters": arm.parameters,
        "threads": torch.get_num_threads(), "device": place.device.type, "seconds": seconds,
        "times_as_fast": {way: ratio(seconds[way], seconds["side by side"]) for way in WAYS[1:]},
        "largest_difference_of_weights": apart,
    }  # fmt: skip


def timed(go: Callable[[], Any], device: torch.device) -> float:
    """Seconds until everything is done."""
    began = time.perf_counter()
    go()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """The median of the ratios of the turns, the smallest and the largest."""
    each = sorted(a / b for a, b in zip(over, under, strict=True))
    return {"median": statistics.median(each), "least": each[0], "most": each[-1]}


def batched(place: Place, arm: Arm, steps: int, seeds: range | None = None) -> list[torch.Tensor]:
    """All seeds at once; the parameters after, networks along the first axis."""
    seeds = seeds or range(place.preset.curriculum.seeds)
    nets = fresh(arm.task.inputs, [arm.width] * (arm.depth - 1), seeds)
    asked = layout(arm.task, [arm.codes], arm.per_code, place.device)
    training = replace(arm.training, steps=steps)
    done = train(nets, asked, torch.tensor(list(seeds)), training)
    return list(done.nets.values())


def singly(place: Place, arm: Arm, steps: int) -> list[torch.Tensor]:
    """One seed after the other by the same code."""
    each = [batched(place, arm, steps, range(n, n + 1))
            for n in range(place.preset.curriculum.seeds)]  # fmt: skip
    return [torch.cat(parts) for parts in zip(*each, strict=True)]


def plainly(place: Place, arm: Arm, steps: int) -> None:
    """One seed after the other as one would write it for one."""
    task, device = arm.task, place.device
    for seed in range(place.preset.curriculum.seeds):
        net = one(fresh(task.inputs, [arm.width] * (arm.depth - 1), [seed]), 0).to(device)
        adam = torch.optim.Adam(net.parameters(), lr=arm.training.lr, eps=arm.training.eps)
        generator = torch.Generator(device).manual_seed(seed)
        control = torch.zeros(len(arm.codes), task.subtasks, device=device)
        for c, code in enumerate(arm.codes):
            control[c, list(code)] = 1
        asked = [torch.tensor(task.asked(code), device=device) for code in arm.codes]
        for _ in range(steps):
            inputs, labels = [], []
            for c, relevant in enumerate(asked):
                bits = torch.randint(0, 2, (arm.per_code, task.bits), generator=generator,
                                     device=device)  # fmt: skip
                inputs.append(torch.cat([control[c].expand(arm.per_code, -1), bits.float()], 1))
                labels.append(bits[:, relevant].sum(1) % 2)
            adam.zero_grad()
            F.cross_entropy(net(torch.cat(inputs)), torch.cat(labels)).backward()
            adam.step()
