"""How the C library holds memory: freed tensors are kept for the next ones.

glibc asks the system for every piece above 32 MB anew and gives it back when it is freed. Each
page of it is then zeroed and faulted in again, which slows training on CPUs; keeping it costs some
memory at the peak (docs/log.md has what it came to).
"""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 2**31 - 1  # bytes; mallopt takes an int


def keep_freed_memory() -> bool:
    """Have this process keep memory that it frees, up to pieces of 2 GB; whether it does now.

    False where the C library is not glibc. The process then holds what it needed at its peak until
    it ends. Environment variables of glibc (MALLOC_TRIM_THRESHOLD_) are overruled.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    done = [mallopt(option, LARGEST) for option in (MMAP_THRESHOLD, TRIM_THRESHOLD)]
    return all(done)
