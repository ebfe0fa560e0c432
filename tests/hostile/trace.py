# ruff: noqa
"""Take hold of another process (here: a child) as a debugger does."""
import ctypes, os, time

libc = ctypes.CDLL(None)
child = os.fork()
if child == 0:
    time.sleep(5)
    os._exit(0)
if libc.ptrace(16, child, None, None) == 0:
    print("ESCAPED")
libc.ptrace(16, 1, None, None)
os.kill(child, 9)
