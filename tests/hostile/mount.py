# ruff: noqa
"""Undo the protections: mount the file system anew, rename the host, change the root."""
import ctypes, os

libc = ctypes.CDLL(None)
if libc.sethostname(b"mine", 4) == 0:
    print("ESCAPED")
if libc.mount(b"tmpfs", b"/tmp", b"tmpfs", ctypes.c_ulong(0), None) == 0:
    print("ESCAPED")
for call in (lambda: os.chroot("/tmp"), lambda: os.setuid(0), lambda: os.mknod("/tmp/disk", 0o60666, 0)):
    try:
        call()
        print("ESCAPED")
    except OSError:
        pass
