# ruff: noqa
"""Look for secrets in the variables of this process, from first to last."""
import os

seen = str(dict(os.environ))
try:
    seen += open("/proc/self/environ").read()
except OSError:
    pass
if GIVEN["secret"] in seen:
    print("ESCAPED")
