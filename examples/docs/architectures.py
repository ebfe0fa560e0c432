"""Write docs/architectures.md from the declarations, on the small models of the tests."""

import sys
from pathlib import Path

SPARE = "experts to spare"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from llm_narrow.architectures import architecture, page  # noqa: E402
from tiny import CONFIGS, FORMS, tiny  # noqa: E402


def text() -> str:
    """The page: model types in order, each followed by its forms; mixtures with experts to spare,
    of which the small models of the tests have none."""
    spare = {kind: f"{kind}, {SPARE}" for kind in CONFIGS}
    models = {kind: FORMS.get(spare[kind], (kind, {})) for kind in CONFIGS}
    models |= {name: form for name, form in FORMS.items() if not name.endswith(SPARE)}
    return page(
        [
            architecture(name, tiny(kind, **changes))
            for name, (kind, changes) in sorted(models.items())
        ]
    )


if __name__ == "__main__":
    (ROOT / "docs" / "architectures.md").write_text(text(), encoding="utf-8")
