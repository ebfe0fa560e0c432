"""The same cut by this project, through the same door as the peers: a folder and a token file."""

import copy
from pathlib import Path

import cut
import torch

from llm_narrow import checkpoint, scores
from llm_narrow.families import find_groups
from llm_narrow.plan import select
from llm_narrow.refit import refit_and_remove
from llm_narrow.units import keep_all, remove

REFITS = {"attribution": None, "attribution-oneshot": False, "attribution-sequential": True}


def main() -> None:
    """Score, choose, refit, remove and save."""
    args = cut.options(list(REFITS))
    tokens = cut.tokens_of(args.calibration)
    batches = tokens.split(args.batch_size)
    model = cut.model_of(args.model)
    original = copy.deepcopy(model.config)
    groups = [g for g in find_groups(model) if g.kind == "neurons"]
    seconds: dict[str, float] = {}
    with cut.clock(seconds, "gradients"):
        running = copy.deepcopy(model).to(torch.bfloat16) if args.bf16 else model
        scored = scores.score(running, groups, batches, criterion="attribution")
        del running
    with cut.clock(seconds, "cut"):
        share = 1 - args.keep / groups[0].size
        keep = keep_all(groups) | select(scored, groups, sparsity={"neurons": share})
        sequential = REFITS[args.setting]
        if sequential is None:
            remove(model, groups, keep)
        else:
            dtype = torch.bfloat16 if args.bf16 else None
            refit_and_remove(model, groups, keep, batches, sequential=sequential, dtype=dtype)
    peak = cut.peak_bytes()

    def write(folder: Path) -> None:
        checkpoint.write(model, None, folder, original_config=original, groups=groups, keep=keep)

    cut.save(model, args.out, tool="llm-narrow", seconds=seconds, peak=peak, write=write)


if __name__ == "__main__":
    main()
