# ruff: noqa
"""Look into, and write to, the process that watches this one."""
import os

for name in ("mem", "environ", "maps"):
    try:
        with open(f"/proc/1/{name}", "rb") as file:
            file.read(1)
        print("ESCAPED", name)
    except OSError:
        pass
try:
    os.listdir("/proc/1/fd")
    print("ESCAPED fd")
except OSError:
    pass
