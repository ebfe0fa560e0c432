"""What mkdocs calls while it builds the site: generated pages, and links out of the docs folder."""

import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))  # the sources beside this file, whatever is installed

import links  # noqa: E402
import reference  # noqa: E402

# Entry of the nav that stands for several pages -> those pages.
SEVERAL = {"reference/cli/": reference.command_pages, "reference/modules/": reference.module_pages}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages that the nav only names by their folder into it."""
    config.nav = _filled(config.nav)
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the reference, and what pages link to in the repository outside of docs/."""
    made = {**reference.pages(), **links.pages(ROOT)}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    for name, place in links.finished(ROOT).items():
        files.append(File.generated(config, name, abs_src_path=str(place)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links to their pages."""
    return links.turned(markdown, page.file.src_uri, ROOT)


def _filled(nav: Any) -> Any:
    """The nav with folders of generated pages replaced by the list of these pages."""
    if isinstance(nav, list):
        return [_filled(entry) for entry in nav]
    if isinstance(nav, dict):
        return {name: _filled(entry) for name, entry in nav.items()}
    return [*SEVERAL[nav]()] if nav in SEVERAL else nav
