# ruff: noqa
"""The same, by the call that makes processes."""
import ctypes, os, platform

number = {"x86_64": 56, "aarch64": 220}[platform.machine()]
child = ctypes.CDLL(None).syscall(ctypes.c_long(number), ctypes.c_long(0x10000011), 0, 0, 0, 0)
if child == 0:
    os._exit(0)
if child > 0:
    print("ESCAPED")
