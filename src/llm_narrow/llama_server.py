"""A GGUF file served by llama.cpp (package xllamacpp) in this process, to ask it by HTTP.

What llama.cpp cannot load it may abort on, and its server cannot be closed: call this in a process
of its own.
"""

import json
import os
import secrets
import urllib.request
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

PACKAGE = "xllamacpp"
Post = Callable[[str, Mapping[str, Any]], Any]  # path and question -> the answer


def serve(file: Path, context: int, *, exact: bool) -> Post:
    """Load the file for `context` tokens; what is given back asks the server.

    `exact` has the cache in float32 and no fused attention, so that what differs from another
    program is due to the weights; else all is as llama.cpp has it by default. It takes as many
    threads as OMP_NUM_THREADS says, or as there are processors.
    """
    x: Any = import_module(PACKAGE)
    p = x.CommonParams()
    p.model.path = str(file)
    p.n_ctx = context
    p.n_parallel = 1
    p.warmup = False
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
    if exact:
        p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    key = secrets.token_hex()  # it listens on a port of this machine
    p.api_keys = [key]
    server = x.Server(p)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}

    def post(path: str, question: Mapping[str, Any]) -> Any:
        body = json.dumps(question).encode()
        url = server.listening_address + path
        with opener.open(urllib.request.Request(url, body, headers)) as reply:
            return json.load(reply)

    return post
