"""Write a model folder, narrowed evenly or not, as a GGUF file for llama.cpp, and have it checked.

Even widths keep their architecture. Uneven ones become `deci`, the one architecture of llama.cpp
that computes what llama does and takes its widths layer by layer. What llama.cpp would load and
then compute otherwise (another activation, a sliding window) is refused here, by name.
"""

import os
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
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import gguf_check
from .cache import no_space
from .errors import BadInput, UnknownName, problems
from .gguf_config import ARCHITECTURES, PAIRED, config_of, head_size, rope_factors
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
ZEROS = 32  # neurons that an MLP gets that has none: a block of quantised numbers
PER_LAYER = ("llama", "mistral", "granite", "qwen2")  # whose layers `deci` can express
FILLED = (MODEL_ARCH.QWEN2, MODEL_ARCH.GPTNEOX)  # heads times their size is the hidden size
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
    config = config_of(folder)
    words = gguf_check.read_tokenizer(folder)
    with ExitStack() as opened:
        weights = _opened(folder, opened)
        widths = _widths(folder, config, weights)
        arch = _arch(folder, config, widths)
        stored = _plan(folder, config, weights, arch, kind, widths)
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
    d, parts = head_size(config), ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"]
    layers, found = "model.layers", []
    if config.model_type == "gpt_neox":
        d, parts = 3 * d, [*["attention.query_key_value"] * 2, "mlp.dense_h_to_4h"]
        layers = "gpt_neox.layers"
    try:
        for i in range(config.num_hidden_layers):
            q, k, n = (_shape(weights, f"{layers}.{i}.{part}.weight")[0] for part in parts)
            # llama.cpp takes the size of a head from the first layer, which so has to have one.
            # What it does without an MLP is left open by neurons of zeros.
            first = i == 0 and not q
            found.append(Width(q // d or int(first), k // d or int(first), n or ZEROS))
    except KeyError as error:
        raise BadInput(
            f"{folder}: {error.args[0]} is missing, which config.json asks for. "
            "Copy or download the folder again."
        ) from error
    return found


def _arch(folder: Path, config: Any, widths: list[Width]) -> MODEL_ARCH:
    """The architecture of llama.cpp that has a place for these widths."""
    arch = ARCHITECTURES[config.model_type]
    whole = arch not in FILLED or widths[0].heads * head_size(config) == config.hidden_size
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
    folder: Path, config: Any, weights: Weights, arch: MODEL_ARCH, kind: GGMLQuantizationType,
    widths: list[Width],
) -> dict[str, Stored]:  # fmt: skip
    """Every tensor of the file, in its order. Raises BadInput if some are missing or unknown."""
    without = [f"blk.{i}.attn_" for i, w in enumerate(widths) if not w.heads]
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
        shape, change = _shape(weights, name), _change(name, arch, head_size(config))
        read = partial(_read, file, name, change)
        if target.startswith(tuple(without)):
            continue
        if 0 in shape:  # of a half of a layer that is gone: zeros, which add nothing
            width = head_size(config) if ".self_attn." in name else ZEROS
            shape = tuple(n or width for n in shape)
            read = partial(torch.zeros, shape)
        plan[target] = Stored(read, shape, _kind(target, shape, kind))
    parts = {name.split(".", 2)[2] for name in plan if name.startswith("blk.")}
    asked = [f"blk.{i}.{part}" for i in range(config.num_hidden_layers) for part in sorted(parts)]
    asked = [name for name in asked if not name.startswith(tuple(without))]
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
    if len(factors := rope_factors(config)):
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


def _describe(writer: Any, folder: Path, config: Any, widths: list[Width], even: bool) -> None:
    """Add what the file says of the model, besides its tokenizer."""
    d = head_size(config)
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
