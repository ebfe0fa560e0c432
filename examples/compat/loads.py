"""Whether narrowed folders load in another transformers, and compute the same there.

    python examples/compat/loads.py --transformers 4.57.6 --out docs/bench/older

Narrows the small models of the tests, of every architecture that has a stock layout, with rotary
angles other than the defaults, and any run folders given with --run. Makes an environment with the
version asked for beside this one's torch, opens them all there with AutoModelForCausalLM, and
compares the logits; of runs the tokenizer too.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "examples" / "bench"))
ANGLES = {"rope_theta": 5e4, "rope_local_base_freq": 3e4, "rotary_emb_base": 5e4, "rotary_pct": 0.5}
PARTIAL = ("phi", "stablelm", "nemotron")  # those that rotate a part of each head
LLAMA3 = {
    "rope_theta": 5e5,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip
TEXT = 'def f(x1, y=12.5):\n    """größer"""\n\treturn  x1 + 2048 if y != "a_b" else None\n' * 8
# What runs in the other environment: no file of ours is imported there.
THERE = '''
import json, sys, torch, transformers
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
asked = json.loads(Path(sys.argv[1]).read_text())
told = {"": transformers.__version__}
for name, (folder, tokens, tokenizer) in asked["folders"].items():
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
        with torch.no_grad():
            logits = model(torch.tensor(tokens)).logits
        file = name.replace("/", " of ") + ".safetensors"
        save_file({"logits": logits.contiguous()}, Path(asked["answers"], file))
        ids = AutoTokenizer.from_pretrained(folder)(asked["text"])["input_ids"] if tokenizer else []
        told[name] = {"ids": ids}
    except Exception as error:
        told[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
Path(asked["answers"], "told.json").write_text(json.dumps(told))
'''


def main(argv: Sequence[str] | None = None) -> None:
    """Make the folders and the environment, ask, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transformers", required=True, help="a version, e.g. 4.57.6")
    parser.add_argument("--run", type=Path, action="append", default=[], help="a run folder")
    parser.add_argument("--environment", type=Path, help="where to keep the environment")
    parser.add_argument("--out", type=Path, required=True, help="without its ending")
    args = parser.parse_args(argv)
    import results

    with tempfile.TemporaryDirectory() as place:
        python = environment(args.environment or Path(place, "env"), args.transformers)
        folders = {**small(Path(place)), **{run.name: of_run(run) for run in args.run}}
        told = asked(python, folders, Path(place))
        if told[""] != args.transformers:
            raise SystemExit(f"{python} has transformers {told['']}, not {args.transformers}.")
        rows = [row(name, *folders[name], told[name], Path(place)) for name in folders]
    about = {"there": args.transformers, **results.machine()}
    results.write(args.out, about, rows, page(rows, about))
    print(f"Written: {args.out}.json, {args.out}.md")


def environment(folder: Path, version: str) -> str:
    """The python of an environment with that version, which takes all else from this one."""
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet",
                        f"transformers=={version}"], check=True)  # fmt: skip
        (site,) = folder.glob("lib/python*/site-packages")
        ours = Path(torch.__file__).parents[1]
        (site / "zz-after.pth").write_text(f"{ours}\n")  # torch, after what was installed
    return str(python)


Folder = tuple[Path, list[list[int]], torch.Tensor, list[int]]


def small(place: Path) -> dict[str, Folder]:
    """Small models of every architecture, half of their neurons gone, as stock folders."""
    from llm_narrow import checkpoint, units
    from llm_narrow.families import find_groups
    from tiny import CONFIGS, FORMS, batch, tiny

    models: dict[str, tuple[str, dict[str, Any]]] = {
        kind: (kind, ANGLES | ({"partial_rotary_factor": 0.25} if kind in PARTIAL else {}))
        for kind in CONFIGS if kind != "mlp"
    }  # fmt: skip
    models |= {**FORMS, "llama, as 3": ("llama", LLAMA3)}
    found = {}
    for name, (kind, changes) in models.items():
        model = tiny(kind, **copy.deepcopy(changes))
        groups, before = find_groups(model), copy.deepcopy(model.config)
        keep = units.keep_all(groups)
        for g in groups:
            if g.kind == "neurons" and g.config is not None:
                keep[g.name][: g.size // 2] = False
        units.remove(model, groups, keep)
        folder = place / "folders" / str(len(found))
        folder.mkdir(parents=True)
        checkpoint.write(model, None, folder, original_config=before, groups=groups, keep=keep)
        tokens = batch(kind)
        with torch.no_grad():
            found[name] = (folder, tokens.tolist(), model(tokens).logits, [])
    return found


def of_run(run: Path) -> Folder:
    """The model of a run, on some text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(run / "model")(TEXT)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        return run / "model", [ids], model(torch.tensor([ids])).logits, ids


def asked(python: str, folders: dict[str, Folder], place: Path) -> dict[str, Any]:
    """What the other environment says of each folder."""
    answers = place / "answers"
    answers.mkdir()
    about = {name: (str(f), tokens, bool(ids)) for name, (f, tokens, _, ids) in folders.items()}
    question = place / "question.json"
    question.write_text(json.dumps({"folders": about, "answers": str(answers), "text": TEXT}))
    subprocess.run([python, "-W", "ignore", "-c", THERE, str(question)], check=True)
    return dict(json.loads((answers / "told.json").read_text()))


def row(
    name: str, _: Path, __: Any, logits: torch.Tensor, ids: list[int], told: Any, place: Path
) -> dict[str, Any]:
    """How far the logits are from ours, relative to the largest, or what went wrong."""
    if "error" in told:
        return {"model": name, "error": told["error"]}
    theirs = load_file(place / "answers" / f"{name.replace('/', ' of ')}.safetensors")["logits"]
    off = float((theirs - logits).abs().max() / logits.abs().max())
    return {"model": name, "difference": off, "same_tokens": told["ids"] == ids if ids else None}


def page(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """A line per model."""
    lines = [
        f"Narrowed folders in transformers {about['there']}: how far logits are from those "
        "here, relative to the largest.",
        "", "| model | difference | tokens |", "| --- | --: | --- |",
    ]  # fmt: skip
    for r in rows:
        tokens = {True: "the same", False: "others", None: ""}[r.get("same_tokens")]
        lines.append(f"| {r['model']} | {r.get('error') or format(r['difference'], '.1e')} "
                     f"| {tokens} |")  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
