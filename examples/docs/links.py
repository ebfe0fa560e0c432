"""Links from the documents to files that are no documents.

On a code host `../src/llm_narrow/vocabulary.py` opens the file. The site has no such file, so each
that is linked to becomes a page below `source/`: Markdown as it is, all else as a listing.

`compared/report.html`, which a run wrote, would stand where the page of `compared/report.md` does.
Finished pages in docs/ are called `report.page.html` on the site.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

SOURCE = "source/"
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=(#[^)\s]*)?\))")
FENCE = re.compile(r"^( *)(```+|~~~+)[^\n]*\n.*?^\1\2[^\n]*$", re.DOTALL | re.MULTILINE)
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".toml": "toml", ".json": "json"}
# Nothing of these pages is found by the search: they only repeat what is in the repository.
HIDDEN = "---\nsearch:\n  exclude: true\n---\n\n"


def pages(root: Path) -> dict[str, str]:
    """Page of the site -> its text, for every file outside of docs/ that a page links to."""
    found: dict[str, str] = {}
    todo = [file.relative_to(root).as_posix() for file in sorted((root / "docs").rglob("*.md"))]
    while todo:
        file = todo.pop()
        for target in _targets((root / file).read_text("utf-8"), file):
            name = page_of(target)
            if target.startswith("docs/") or name in found or not (root / target).is_file():
                continue
            found[name] = _page(target, (root / target).read_text("utf-8"))
            if target.endswith(".md"):
                todo.append(target)
    return found


def finished(root: Path) -> dict[str, Path]:
    """Place on the site -> file, for the finished pages in docs/."""
    files = sorted((root / "docs").rglob("*.html"))
    return {page_of(file.relative_to(root).as_posix()): file for file in files}


def page_of(file: str) -> str:
    """The page of the site that shows a file of the repository."""
    if file.startswith("docs/"):
        return re.sub(r"\.html$", ".page.html", file.removeprefix("docs/"))
    return SOURCE + (file if file.endswith(".md") else f"{file}.md")


def file_of(page: str) -> str:
    """The file of the repository that a page of the site shows; the reverse of `page_of`."""
    if not page.startswith(SOURCE):
        return f"docs/{page}"
    file = page.removeprefix(SOURCE)
    listing = file.removesuffix(".md")
    return listing if Path(listing).suffix else file


def turned(markdown: str, page: str, root: Path) -> str:
    """The text of a page with links to files outside of docs/ turned into links to their pages."""
    file = file_of(page)

    def turn(link: re.Match[str]) -> str:
        target = _resolved(link[0], file)
        inside = target.startswith("docs/") and file.startswith("docs/")
        if (inside and not target.endswith(".html")) or not (root / target).is_file():
            return link[0]
        return posixpath.relpath(page_of(target), posixpath.dirname(page) or ".")

    return "".join(LINK.sub(turn, part) if prose else part for prose, part in _parts(markdown))


def _targets(text: str, file: str) -> Iterator[str]:
    for prose, part in _parts(text):
        if prose:
            yield from (_resolved(link[0], file) for link in LINK.finditer(part))


def _parts(text: str) -> Iterator[tuple[bool, str]]:
    """The text cut into prose (True) and fenced blocks (False)."""
    at = 0
    for fence in FENCE.finditer(text):
        yield True, text[at : fence.start()]
        yield False, fence[0]
        at = fence.end()
    yield True, text[at:]


def _resolved(link: str, file: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(file), link))


def _page(file: str, text: str) -> str:
    if file.endswith(".md"):
        return HIDDEN + text
    language = LANGUAGES.get(Path(file).suffix, "text")
    return f"{HIDDEN}# `{file}`\n\n`````{language}\n{text.rstrip()}\n`````\n"
