# ruff: noqa
"""Reach a file outside by a link, by the roots of other processes, and by climbing."""
import os

os.symlink(GIVEN["file"], "link")
up = "../" * 20
for path in ("link", f"/proc/1/root{GIVEN['file']}", f"/proc/self/cwd/{up}{GIVEN['file']}"):
    try:
        if open(path).read() == "precious":
            print("ESCAPED")
    except OSError:
        pass
