# ruff: noqa
"""Look for secrets in the variables of another process."""
if GIVEN["secret"] in open(f"/proc/{GIVEN['process']}/environ").read():
    print("ESCAPED")
