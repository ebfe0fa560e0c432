# ruff: noqa
"""Take memory that is nobody's: of the system's own files and segments in memory."""
import ctypes, os

found = 0
try:
    os.write(os.memfd_create("hidden"), b"x" * (8 << 20))
    found += 1
except OSError:
    pass
libc = ctypes.CDLL(None)
segment = libc.shmget(0, 1 << 20, 0o1600)
if segment != -1:
    libc.shmctl(segment, 0, None)
    found += 1
if found:
    print("ESCAPED")
