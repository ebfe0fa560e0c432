# ruff: noqa
"""Close whatever is open, and go on."""
import os, time

os.closerange(0, 1024)
time.sleep(0.5)
