"""Whether llama.cpp says the same: of text, before a GGUF file is written, and of the file after.

The file is opened by llama.cpp (package xllamacpp) in a process of its own, which is this module
run as a program: what llama.cpp cannot load it may abort on, and its server cannot be closed.
"""

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import BadInput, problems
from .llama_server import PACKAGE, serve
from .progress import Track, silent

# torch and what needs it is imported where it is used: the process with llama.cpp does not.

REPORT = "Nothing was left. Please report this, with the command and the model."
# Largest |difference of log-probabilities| / largest |logit|, and what a greedy choice may be worse
# than the best one by, on the same scale. llama.cpp rounds activations to the type of the weights.
TOLERANCE = {"f32": 5e-4, "f16": 2e-3}
PROMPTS = (
    "def fibonacci(n):\n",
    "import os\nimport sys\n\n\nclass ",
    "for i in range(10):\n    print(",
    "The quick brown fox",
    "Once upon a time, in 1984, there",
    "# Sort the list and return",
    '{"name": "value", "items": [1, 2,',
    "SELECT name, count(*) FROM",
)
TEXT = '''def mean(values: list[float]) -> float:
    """The arithmetic mean of a list that is not empty."""
    total = 0.0
    for value in values:
        total += value
    return total / len(values)


print(mean([1.5, 2.25, 1024]))  # The answer is printed, not returned, so that people can see it.
'''
TEXTS = (
    TEXT,
    "    1 + 2345\r\n\r\n  I'LL we've don't  naïve 漢字 ١٢٣ ${a}<=>b^~|  ",
    "a  b   c\t\td \n e\u00a0f 12 345 6789 0x1F_FF v1.2.3 ½² größer 🙂👍🏽 \n\n\n",
    "Здравствуй, мир! שלום नमस्ते สวัสดี 안녕하세요 ...!?;:'\"``--__==",
    "x" * 70 + " " * 40 + "0" * 30 + "\n" * 9,
)
# Words of these are all that the ways of splitting could treat differently.
PIECES = ("a", "Zb", "é", "漢", "1", "23456", "٣", "½", " ", "   ", "\n", "\r\n", "\t", "\u00a0",
          "'s", "'LL", "'x", "!", "_", "$", "<=>", "^~|", "\u0301", "🙂")  # fmt: skip


@dataclass(frozen=True)
class Words:
    """A byte-level tokenizer, as a GGUF file says it."""

    tokens: dict[int, tuple[str, Any]]  # with their gguf.TokenType
    merges: tuple[str, ...]
    pre: str  # how text is split, by llama.cpp's name
    special: dict[str, int]  # "bos", "eos", … -> token
    begins: bool  # every text with bos
    ends: bool  # … with eos
    template: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """What llama.cpp said of the file, and transformers, in float32, of the folder.

    `same` of `tokens` greedy tokens are also transformers' choice after the same tokens, `ties` of
    the others cost less than the tolerance. `difference` is the largest of a log-probability,
    relative to the largest logit; `loss` and `loss_there` are nats per token of a text, there being
    llama.cpp, `agreement` the share of it with the same likeliest token.
    """

    prompts: int
    whole: int  # prompts with the very same continuation
    tokens: int
    same: int
    ties: int
    difference: float
    tolerance: float | None  # None where differences are told and not judged
    loss: float
    loss_there: float
    agreement: float
    texts: int  # encoded the same
    runtime: str
    speed: float  # tokens per second of llama.cpp, the median of the prompts


def require_llama_cpp() -> None:
    """Raise BadInput where llama.cpp is not installed."""
    if find_spec(PACKAGE) is None:
        raise BadInput(
            f"The check of a GGUF file needs llama.cpp (package {PACKAGE}), which is not "
            "installed. Install llm-narrow[gguf], or leave the check out with --no-check."
        )


def read_tokenizer(folder: Path) -> Words:
    """The tokenizer of a folder. Raises BadInput for one that llama.cpp would not follow."""
    from gguf import TokenType
    from tokenizers.normalizers import NFC
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoTokenizer

    from .from_gguf import PRE_TOKENIZERS, WHOLE_WORDS

    if not (folder / "tokenizer.json").is_file():
        raise BadInput(f"{folder} has no tokenizer.json. Put the model's own beside its weights.")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend = tokenizer.backend_tokenizer
        model = json.loads(backend.to_str())["model"]
    except BaseException as error:  # tokenizers, in Rust, panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BadInput(f"{folder}: the tokenizer cannot be loaded: {error}") from error
    if model["type"] != "BPE":
        raise BadInput(
            f"{folder}: a {model['type']} tokenizer cannot be written as GGUF yet. Known: "
            "byte-level BPE, as of GPT-2, Llama 3, Qwen and SmolLM."
        )
    vocabulary, notes = backend.get_vocab(), []
    pre = _split_as(backend.pre_tokenizer)
    wrong = [] if pre else [f"it splits text as none of these: {', '.join(PRE_TOKENIZERS)}"]
    for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            wrong.append(f"{key} is {model[key]!r}; it has to be unset")
    if pre and bool(model.get("ignore_merges")) != (pre in WHOLE_WORDS):
        wrong.append(f"ignore_merges has to be {pre in WHOLE_WORDS} where text is split as {pre}")
    if model.get("unk_token") and not {*ByteLevel.alphabet()} <= {*vocabulary}:
        wrong.append("bytes without a token become unk_token; there they are left out")
    if isinstance(backend.normalizer, NFC):
        notes.append("text is normalised to NFC by the tokenizer, and taken as it is by llama.cpp")
    elif backend.normalizer is not None:
        wrong.append(f"text is normalised ({type(backend.normalizer).__name__}); it must not be")
    added = backend.get_added_tokens_decoder()
    for token in added.values():
        if token.lstrip or token.rstrip or token.single_word:
            wrong.append(f"{token.content!r} also takes spaces, or stands for whole words only")
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {name: getattr(tokenizer, f"{short}_token_id") for name, short in names.items()}
    if ids["eos"] is None:
        wrong.append("it has no eos_token, and llama.cpp would take token 11 for it")
    if ids["bos"] is None:
        ids["bos"] = ids["eos"]  # else llama.cpp takes token 11
    plain, full = (tokenizer(TEXT, add_special_tokens=add)["input_ids"] for add in (False, True))
    around = [
        (begins, ends) for begins in (False, True) for ends in (False, True)
        if full == [ids["bos"]] * begins + plain + [ids["eos"]] * ends
    ]  # fmt: skip
    if not around:
        wrong.append("it puts other tokens around a text than bos before and eos after it")
    if wrong:
        raise problems(f"{folder}: llama.cpp would tokenize otherwise", wrong)
    tokens = {index: (token, TokenType.NORMAL) for token, index in vocabulary.items()}
    for index, token in added.items():
        kind = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
        tokens[index] = (token.content, kind)
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    template = tokenizer.chat_template
    return Words(
        tokens, tuple(pairs), str(pre), {name: at for name, at in ids.items() if at is not None},
        *around[0], template if isinstance(template, str) else None, tuple(notes),
    )  # fmt: skip


def _split_as(splits: Any) -> str | None:
    """llama.cpp's name of the way in which all words of up to three pieces are split the same."""
    from .from_gguf import PRE_TOKENIZERS

    if splits is None:
        return None
    words = ["".join(w) for n in (1, 2, 3) for w in itertools.product(PIECES, repeat=n)]
    # And all that its own expressions name: they may single out a word.
    words += [f"a{named}b" for named in re.findall(r"\w+", splits.__getstate__().decode())]
    found = [(word, splits.pre_tokenize_str(word)) for word in [*TEXTS, *words]]
    for name, made in PRE_TOKENIZERS.items():
        known = made()
        if all(known.pre_tokenize_str(word) == pieces for word, pieces in found):
            return name
    return None


def add_tokenizer(writer: Any, words: Words, rows: int) -> None:
    """Add the tokenizer to a GGUFWriter, filled up to `rows` with tokens that no text gives."""
    from gguf import TokenType

    if (last := max(words.tokens)) >= rows:
        raise BadInput(
            f"The tokenizer gives ids up to {last}, and the model has {rows} embeddings. Put the "
            "model's own tokenizer beside its weights."
        )
    unused = ((f"[PAD{i}]", TokenType.UNUSED) for i in range(rows))
    tokens, kinds = zip(*(words.tokens.get(i, u) for i, u in enumerate(unused)), strict=True)
    writer.add_vocab_size(rows)
    writer.add_tokenizer_model("gpt2")  # which is how llama.cpp calls byte-level BPE
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(words.merges)
    for name, index in words.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    writer.add_add_bos_token(words.begins)
    writer.add_add_eos_token(words.ends)
    if words.template:
        writer.add_chat_template(words.template)


def check(
    file: Path,
    folder: Path,
    quantize: str,
    track: Track = silent,
    *,
    prompts: Sequence[str] = PROMPTS,
    length: int = 64,
) -> Findings:
    """Compare llama.cpp and transformers on the greedy `length` tokens after each prompt, on the
    log-probabilities of so many tokens of a text, and on how texts are split into tokens.

    Raises NotVerified where text is encoded otherwise, and in f32 and f16 where a log-probability
    or a choice differs by more than the tolerance. Other types are rounded on purpose: of those
    the differences are told.
    """
    from . import models
    from .verify import NotVerified

    loaded = models.load(str(folder.absolute()), track=track)
    context = loaded.model.config.max_position_embeddings
    room = min(16, context // 4)
    asked = {
        "file": str(file),
        "prompts": [loaded.tokenizer(p)["input_ids"][:room] for p in prompts],
        "length": min(length, context - room),
        "text": loaded.tokenizer(TEXT)["input_ids"][: min(length, context - 1)],
        "texts": TEXTS,
        "context": min(context, 256),
    }
    found: Findings
    for step in track(["llama.cpp", "transformers"], "checking the GGUF file"):
        if step == "llama.cpp":
            said = ask(asked, seconds=600 + file.stat().st_size / 2e5)
            for text, encoded in zip(TEXTS, said["encoded"], strict=True):
                if encoded != loaded.tokenizer(text)["input_ids"]:
                    raise NotVerified(
                        f"The file is refused: llama.cpp encodes {text[:60]!r} otherwise than the "
                        f"model's tokenizer. {REPORT}"
                    )
        else:
            found = _compared(loaded, asked, said, TOLERANCE.get(quantize))
    if found.tolerance is not None:
        if not found.difference <= found.tolerance:  # so that nan is refused too
            raise NotVerified(
                "The file is refused: log-probabilities by llama.cpp differ from those by "
                f"transformers by {found.difference:.2g} of the largest logit, more than "
                f"{found.tolerance:g}. {REPORT}"
            )
        if other := found.tokens - found.same - found.ties:
            raise NotVerified(
                f"The file is refused: of {found.tokens} greedy tokens llama.cpp takes {other} "
                f"that are clearly not the likeliest to transformers. {REPORT}"
            )
    return found


def _compared(loaded: Any, asked: Any, said: Any, tolerance: float | None) -> Findings:
    """What llama.cpp said against what transformers says after the very same tokens.

    So a token that differs hides none behind it, and where none differs the greedy continuations
    are the same: each token is then transformers' choice after those before it.
    """
    import torch

    def judged(tokens: list[int], start: int) -> tuple[Any, Any]:
        """Log-probabilities of each token from `start` on, (n,), and of all others, (n, V)."""
        with torch.inference_mode():
            logits = loaded.model(torch.tensor([tokens[:-1]]), use_cache=False).logits[0]
        sizes.append(float(logits.abs().max()))
        told = logits[start - 1 :].float().log_softmax(-1)
        return told.gather(1, torch.tensor(tokens[start:])[:, None])[:, 0], told

    sizes: list[float] = []
    costs = []  # by how much each token is less likely than the likeliest
    for prompt, after in zip(asked["prompts"], said["generated"], strict=True):
        taken, told = judged([*prompt, *after], len(prompt))
        costs.append(told.max(-1).values - taken)
    here, told = judged(asked["text"], 1)
    there, likeliest = (torch.tensor(column) for column in zip(*said["text"], strict=True))
    size, cost = max(sizes), torch.cat(costs)
    return Findings(
        prompts=len(costs),
        whole=sum(not c.any() for c in costs),
        tokens=len(cost),
        same=int((cost == 0).sum()),
        ties=int(((cost > 0) & (cost <= (tolerance or 0.0) * size)).sum()),
        difference=float((here - there).abs().max()) / size,
        tolerance=tolerance,
        loss=-float(here.mean()),
        loss_there=-float(there.mean()),
        agreement=float((told.argmax(-1) == likeliest).float().mean()),
        texts=len(asked["texts"]),
        runtime=f"{PACKAGE} {version(PACKAGE)}",
        speed=statistics.median(said["speed"]),
    )


def ask(question: dict[str, Any], *, seconds: float) -> dict[str, Any]:
    """What llama.cpp answers in a process of its own: see `main`. Raises NotVerified."""
    from .verify import NotVerified

    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory(prefix="llm-narrow-") as place:
        Path(place, "question").write_text(json.dumps(question), encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "llm_narrow.gguf_check", place],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                capture_output=True, text=True, errors="replace", check=False, timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            raise NotVerified(
                f"The file is refused: llama.cpp did not answer in {seconds:.0f} seconds. Nothing "
                "was left."
            ) from late
        if done.returncode:
            lines = (done.stderr + done.stdout).splitlines() or [f"exit code {done.returncode}"]
            # Its log marks errors; the first says why, the last is our own traceback.
            told = [line.split(" E ", 1)[1] for line in lines if " E " in line] or lines[-1:]
            raise NotVerified(f"The file is refused: llama.cpp cannot run it: {told[0]}. {REPORT}")
        answer: dict[str, Any] = json.loads(Path(place, "answer").read_text(encoding="utf-8"))
        return answer


def main(place: Path) -> None:
    """Load the file and answer: greedy tokens, log-probabilities of a text, encoded texts."""
    asked = json.loads((place / "question").read_text(encoding="utf-8"))
    post = serve(Path(asked["file"]), asked["context"], exact=True)
    greedy: dict[str, Any] = {"temperature": -1, "n_probs": 1, "return_tokens": True}
    answer: dict[str, list[Any]] = {"generated": [], "speed": [], "text": [], "encoded": []}
    for prompt in asked["prompts"]:
        said = post("/completion", {**greedy, "prompt": prompt, "n_predict": asked["length"]})
        answer["generated"].append(said["tokens"])
        answer["speed"].append(said["timings"]["predicted_per_second"])
    for at in range(1, len(asked["text"])):
        # The next token of the text is forced; what is told are the probabilities of before that.
        forced = {"n_predict": 1, "logit_bias": [[asked["text"][at], 1e9]]}
        said = post("/completion", {**greedy, **forced, "prompt": asked["text"][:at]})
        (token,) = said["completion_probabilities"]
        answer["text"].append([token["logprob"], token["top_logprobs"][0]["id"]])
    for text in asked["texts"]:
        question = {"content": text, "add_special": True, "parse_special": True}
        answer["encoded"].append(post("/tokenize", question)["tokens"])
    (place / "answer").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
