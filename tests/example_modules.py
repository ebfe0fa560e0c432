"""Modules of the examples, which are folders of scripts and no packages."""

import importlib
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent / "examples"


def opened(example: str) -> dict[str, Any]:
    """All modules of an example by name, imported once and taken out of sys.modules again.

    Other examples have modules of the same names.
    """
    folder = ROOT / example
    names = [p.stem for p in sorted(folder.glob("*.py"))]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        return {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(others)
