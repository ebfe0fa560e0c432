# ruff: noqa
"""Print without end."""
while True:
    print("passed " * 1000)
