"""Write a model folder, narrowed evenly or not, as a GGUF file for llama.cpp, and have it checked.

Even widths keep their architecture. Uneven ones become `deci`, the one architecture of llama.cpp
that computes what llama does and takes its widths layer by layer. What llama.cpp would load and
then compute otherwise (another activation, a sliding window) is refused here, by name.
"""

import json
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig

from . import gguf_check
from .cache import no_space
from .checkpoint import layout
from .errors import BadInput, UnknownName, problems
from .models import COMPUTED
from .progress import Track, silent
from .verify import weight_files

F16, F32, Q4_0, Q8_0 = (GGMLQuantizationType[name] for name in ("F16", "F32", "Q4_0", "Q8_0"))
QUANTIZATIONS = {
    "f32": (F32, LlamaFileType.ALL_F32),
    "f16": (F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
# Mistral, and granite with its multipliers at 1, compute what llama does.
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "granite": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gpt_neox": MODEL_ARCH.GPTNEOX,
}
PER_LAYER = ("llama", "mistral", "granite", "qwen2")  # whose layers `deci` can express
PAIRED = (MODEL_ARCH.LLAMA, MODEL_ARCH.DECI)  # rotary pairs side by side, not half a head apart
FILLED = (MODEL_ARCH.QWEN2, MODEL_ARCH.GPTNEOX)  # heads times their size is the hidden size
GELU = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # all of them one there
EMBEDDING, OUTPUT, FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
Weights = Mapping[str, Any]  # name of a tensor -> the opened file that holds it


@dataclass(frozen=True)
class Exported:
    """A GGUF file that was written. `wide` are tensors left in f16, whose rows fill no blocks."""

    file: Path
    bytes: int
    arch: str
    quantization: str
    wide: tuple[str, ...]
    notes: tuple[str, ...]  # what its user has to know
    check: gguf_check.Findings | None  # None if it was not asked for


@dataclass(frozen=True)
class Stored:
    """One tensor of the GGUF file: what it is made of, and as what it is written."""

    read: Callable[[], Tensor]
    shape: tuple[int, ...]
    kind: GGMLQuantizationType


@dataclass(frozen=True)
class Width:
    """The sizes of one layer."""

    heads: int
    key_heads: int
    neurons: int


def export(
    folder: Path,
    out: Path,
    *,
    quantize: str = "f16",
    force: bool = False,
    check: bool = True,
    track: Track = silent,
) -> Exported:
    """Write the model of `folder`, a model or a run folder, to the file `out`.

    With `check`, llama.cpp has to say of the file what transformers says of the folder, or there
    is no file. Raises UnknownName for `quantize`, NotVerified, and BadInput for a model that
    llama.cpp does not run as it is, a folder that is not whole, and an `out` that is not free.
    """
    if quantize not in QUANTIZATIONS:
        raise UnknownName("Quantization", quantize, QUANTIZATIONS)
    if check:
        gguf_check.require_llama_cpp()
    folder, out = Path(folder).expanduser(), Path(out).expanduser().absolute()
    if not (folder / "config.json").exists() and (folder / "model").is_dir():
        folder = folder / "model"  # a run keeps its model there
    kind, file_type = QUANTIZATIONS[quantize]
    config = _config(folder)
    words = gguf_check.read_tokenizer(folder)
    with ExitStack() as opened:
        weights = _opened(folder, opened)
        widths = _widths(folder, config, weights)
        arch = _arch(folder, config, widths)
        stored = _plan(folder, config, weights, arch, kind)
        with _written_whole(out, force) as fresh:
            writer = GGUFWriter(fresh, gguf.MODEL_ARCH_NAMES[arch])
            _describe(writer, folder, config, widths, arch != MODEL_ARCH.DECI)
            writer.add_file_type(file_type)
            gguf_check.add_tokenizer(writer, words, rows=stored[EMBEDDING].shape[0])
            _write(writer, stored, track)
            found = gguf_check.check(fresh, folder, quantize, track) if check else None
    return Exported(
        file=out,
        bytes=out.stat().st_size,
        arch=gguf.MODEL_ARCH_NAMES[arch],
        quantization=quantize,
        wide=tuple(n for n, s in stored.items() if kind in (Q4_0, Q8_0) and s.kind == F16),
        notes=words.notes,
        check=found,
    )


def _config(folder: Path) -> Any:
    """The config of what the folder computes. Raises BadInput for what llama.cpp would not."""
    uneven = layout(folder) == "uneven"
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        if uneven:
            fields["model_type"] = fields["narrow"]["of"]
        kind = str(fields["model_type"])
        if kind not in ARCHITECTURES:
            raise BadInput(
                f"{folder}: model type {kind!r} cannot be written as GGUF yet. "
                f"Known: {', '.join(sorted(ARCHITECTURES))}."
            )
        config = AutoConfig.for_model(**fields)
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" …")
        raise BadInput(f"{folder}/config.json is damaged: {reason}") from error
    if found := _strange(config):
        raise problems(f"{folder} would be computed otherwise by llama.cpp", found)
    return config


def _strange(c: Any) -> list[str]:
    """What in the config llama.cpp has no way of computing, or computes without being told."""
    found, neox = [], c.model_type == "gpt_neox"
    known = GELU if neox else ("silu", "swish")
    if c.hidden_act not in known:
        found.append(f"hidden_act is {c.hidden_act!r}; it has to be {known[0]!r}")
    window = getattr(c, "sliding_window", None)
    if window and getattr(c, "use_sliding_window", True) and window < c.max_position_embeddings:
        found.append(f"sliding_window is {window}; it has to be null: attention to all tokens")
    rope = c.rope_parameters
    scaled = rope.get("rope_type", "default")
    allowed = ("default", "llama3") if ARCHITECTURES[c.model_type] in PAIRED else ("default",)
    if scaled not in allowed:
        found.append(f"rope_type is {scaled!r}; it has to be {' or '.join(map(repr, allowed))}")
    if not neox and rope.get("partial_rotary_factor", 1) != 1:
        found.append("partial_rotary_factor has to be 1: whole heads are rotated")
    if c.model_type == "qwen3" and c.attention_bias:
        found.append("attention_bias has to be false")
    if c.model_type == "granite":
        neutral = {"embedding_multiplier": 1, "residual_multiplier": 1, "logits_scaling": 1}
        for key, value in {**neutral, "attention_multiplier": _head(c) ** -0.5}.items():
            if abs(getattr(c, key) - value) > 1e-6:
                found.append(f"{key} is {getattr(c, key)}; it has to be {value:g}, as in llama")
    return found


def _head(config: Any) -> int:
    """How many dimensions a head has."""
    own = None if config.model_type == "gpt_neox" else getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def _opened(folder: Path, opened: ExitStack) -> Weights:
    """Every tensor of the folder by name, none of them read yet."""
    found: dict[str, Any] = {}
    for path in weight_files(folder):
        try:
            file = opened.enter_context(safe_open(path, framework="pt"))
            names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise BadInput(
                f"{path} is damaged or cut short ({error}). Copy or download it again."
            ) from error
        found |= {name: file for name in names if not COMPUTED.search(name)}
    for name, file in found.items():
        if (kind := file.get_slice(name).get_dtype()) not in ("F64", "F32", "F16", "BF16"):
            told = f"{folder}: {name} is of type {kind}: quantised weights. "
            raise BadInput(f"{told}Give the model of before.")
    return found


def _shape(weights: Weights, name: str) -> tuple[int, ...]:
    return tuple(weights[name].get_slice(name).get_shape())


def _widths(folder: Path, config: Any, weights: Weights) -> list[Width]:
    """The width of each layer, as its weights have it."""
    d, parts = _head(config), ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"]
    layers, found = "model.layers", []
    if config.model_type == "gpt_neox":
        d, parts = 3 * d, [*["attention.query_key_value"] * 2, "mlp.dense_h_to_4h"]
        layers = "gpt_neox.layers"
    try:
        for i in range(config.num_hidden_layers):
            q, k, n = (_shape(weights, f"{layers}.{i}.{part}.weight")[0] for part in parts)
            found.append(Width(q // d, k // d, n))
    except KeyError as error:
        raise BadInput(
            f"{folder}: {error.args[0]} is missing, which config.json asks for. "
            "Copy or download the folder again."
        ) from error
    return found


def _arch(folder: Path, config: Any, widths: list[Width]) -> MODEL_ARCH:
    """The architecture of llama.cpp that has a place for these widths."""
    arch = ARCHITECTURES[config.model_type]
    whole = arch not in FILLED or widths[0].heads * _head(config) == config.hidden_size
    if len(set(widths)) == 1 and whole:
        return arch
    if config.model_type in PER_LAYER:
        return MODEL_ARCH.DECI
    lost, way = ("its layers differ in width", "") if whole else ("heads are gone", " and no heads")
    raise BadInput(
        f"{folder}: {lost}, which llama.cpp cannot load for {config.model_type} (it can for "
        f"{', '.join(PER_LAYER)}). Prune with --allocation uniform{way}."
    )


def _plan(
    folder: Path, config: Any, weights: Weights, arch: MODEL_ARCH, kind: GGMLQuantizationType
) -> dict[str, Stored]:
    """Every tensor of the file, in its order. Raises BadInput if some are missing or unknown."""
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    plan: dict[str, Stored] = {}
    wrong = []
    for name, file in weights.items():
        target = names.get_name(name, (".weight", ".bias"))
        if name in ("lm_head.weight", "embed_out.weight"):  # one of the two, by kind and layout
            target = OUTPUT
        if target is None:
            wrong.append(f"{name} has no place in a GGUF file of {gguf.MODEL_ARCH_NAMES[arch]}")
            continue
        shape, change = _shape(weights, name), _change(name, arch, _head(config))
        plan[target] = Stored(partial(_read, file, name, change), shape, _kind(target, shape, kind))
    parts = {name.split(".", 2)[2] for name in plan if name.startswith("blk.")}
    asked = [f"blk.{i}.{part}" for i in range(config.num_hidden_layers) for part in sorted(parts)]
    asked += [EMBEDDING, "output_norm.weight", *([] if config.tie_word_embeddings else [OUTPUT])]
    wrong += [f"{name} (of the GGUF file) is missing" for name in asked if name not in plan]
    if wrong:
        raise problems(f"{folder}: weights do not fit config.json", wrong[:8])
    if config.tie_word_embeddings:
        head = plan.pop(OUTPUT, plan[EMBEDDING])
        if head is not plan[EMBEDDING] and not torch.equal(head.read(), plan[EMBEDDING].read()):
            raise BadInput(
                f"{folder}: config.json ties the head to the embedding, and the head stored is "
                'another. Set "tie_word_embeddings" to what the model was trained with.'
            )
        if arch == MODEL_ARCH.GPTNEOX:  # which llama.cpp does not tie
            plan[OUTPUT] = plan[EMBEDDING]
    if len(factors := _rope_factors(config)):
        plan[FACTORS] = Stored(lambda: factors, tuple(factors.shape), F32)
    return plan


def _kind(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """As what a tensor is written: vectors whole, rows that fill no blocks as f16."""
    if len(shape) == 1:
        return F32
    if kind == Q4_0 and name in (EMBEDDING, OUTPUT):
        kind = Q8_0  # four bits cost most there; llama.cpp's own tool keeps six
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else F16


def _change(name: str, arch: MODEL_ARCH, d: int) -> Callable[[Tensor], Tensor] | None:
    """How the rows of a tensor are put in llama.cpp's order, if it has another."""
    if ".query_key_value." in name:  # (head, q|k|v, dim) there becomes (q|k|v, head, dim)
        return lambda t: t.reshape(-1, 3, d, *t.shape[1:]).transpose(0, 1).reshape(t.shape)
    if arch in PAIRED and (".q_proj." in name or ".k_proj." in name):
        return lambda t: t.reshape(-1, 2, d // 2, *t.shape[1:]).transpose(1, 2).reshape(t.shape)
    return None


def _read(file: Any, name: str, change: Callable[[Tensor], Tensor] | None) -> Tensor:
    tensor: Tensor = file.get_tensor(name).float()
    return change(tensor) if change else tensor


def _rope_factors(config: Any) -> Tensor:
    """By what llama.cpp divides the rotary frequencies of a head, (d / 2,); empty where by none.

    Llama 3.1's rule: wavelengths that fit `high` times into the original context stay, those that
    fit `low` times are stretched by `factor`, those between by what lies between.
    """
    rope, d = config.rope_parameters, _head(config)
    if rope.get("rope_type", "default") == "default":
        return torch.empty(0)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    powers: Tensor = rope["rope_theta"] ** (torch.arange(0, d, 2).double() / d)
    fits = rope["original_max_position_embeddings"] / (2 * torch.pi * powers)
    stay: Tensor = ((fits - low) / (high - low)).clamp(0, 1)
    return torch.reciprocal(stay + (1 - stay) / rope["factor"]).float()


def _describe(writer: Any, folder: Path, config: Any, widths: list[Width], even: bool) -> None:
    """Add what the file says of the model, besides its tokenizer."""
    d = _head(config)
    writer.add_name(folder.parent.name if folder.name == "model" else folder.name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    for add, sizes in (
        (writer.add_feed_forward_length, [w.neurons for w in widths]),
        (writer.add_head_count, [w.heads for w in widths]),
        (writer.add_head_count_kv, [w.key_heads for w in widths]),
    ):
        add(sizes[0] if even else sizes)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type == "gpt_neox":
        share = config.rope_parameters.get("partial_rotary_factor", 1.0)
        writer.add_rope_dimension_count(int(d * share))
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_parallel_residual(config.use_parallel_residual)
        return
    for add in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
        add(d)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _write(writer: GGUFWriter, stored: Mapping[str, Stored], track: Track) -> None:
    """Write header and tensors; of these only one is in memory at a time."""
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, s in stored.items():
        block, size = GGML_QUANT_SIZES[s.kind]
        count = int(np.prod(s.shape)) // block * size
        writer.add_tensor_info(name, s.shape, np.dtype("float32"), count, s.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, s in track(stored.items(), "writing the GGUF file"):
            writer.write_tensor_data(_packed(name, s))
    finally:
        writer.close()


def _packed(name: str, s: Stored) -> Any:
    """The tensor as an array of the bytes of its kind."""
    whole = s.read().numpy()
    with np.errstate(over="ignore"):
        packed = gguf.quants.quantize(whole, s.kind)
    if not np.isfinite(packed if s.kind in (F16, F32) else whole).all():
        raise BadInput(
            f"{name} holds numbers that are infinite, none, or above what f16 can say (65504). "
            "For the last, export with --quantize bf16 or f32."
        )
    return np.ascontiguousarray(packed)


@contextmanager
def _written_whole(target: Path, force: bool) -> Iterator[Path]:
    """A fresh path beside `target` to write to; it becomes `target` when the block ends well."""
    if target.is_dir():
        raise BadInput(f"{target} is a folder. Give the name of a file, such as model.gguf.")
    if os.path.lexists(target) and not force:
        raise BadInput(f"{target} exists already. Choose another, or replace it with --force.")
    fresh = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        fresh.replace(target)
    except OSError as error:
        raise no_space(error, target) or BadInput(
            f"{target} cannot be written: {error.strerror or error}. Choose another place."
        ) from error
    finally:
        fresh.unlink(missing_ok=True)
