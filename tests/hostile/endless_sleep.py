# ruff: noqa
"""Never end, using no CPU time."""
import time

time.sleep(1000)
