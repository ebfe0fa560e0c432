# ruff: noqa
"""Take more memory than is allowed, shared out to children that are each within the limit."""
import os, time

for _ in range(8):
    if os.fork() == 0:
        taken = bytearray(100 << 20)
        taken[:: 4096] = b"x" * len(taken[:: 4096])
        time.sleep(30)
        os._exit(0)
time.sleep(4)
print("ESCAPED")
