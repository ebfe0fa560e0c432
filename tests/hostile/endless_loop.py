# ruff: noqa
"""Never end, and be deaf to being told that the CPU time is up."""
import signal

signal.signal(signal.SIGXCPU, signal.SIG_IGN)
while True:
    pass
