"""Put a run on the hub: what belongs to its checkpoint, described, and nothing else of it.

One commit holds all, so that nobody can load half of a push. Weights go up before the commit and
are known by their content: what reached the hub in a push that was stopped, or has not changed
since the last one, is not sent again.
"""

import logging
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from huggingface_hub.utils import logging as hub_logging
from rich.console import Console

from . import __version__, card, push_files, report
from . import rows as rowfile
from .errors import BadInput, NarrowError, Unreachable, first_line
from .report import at

if TYPE_CHECKING:
    from rich.console import RenderableType

PLACE = re.compile(r"(?<![\w.:/])(?:~?/|[A-Z]:\\)[\w.][^\s\"',]*")  # a path from the root or home
LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN"
ON_THE_HUB = """\
import llm_narrow

loaded = llm_narrow.load("FOLDER")
model, tokenizer = loaded.model, loaded.tokenizer"""


@dataclass(frozen=True)
class Pushed:
    """What went up, or would. `files` are bytes by name; `changed` is whether anything differed."""

    repo: str
    branch: str
    private: bool
    message: str
    files: Mapping[str, int]
    left_out: Mapping[str, str]  # name -> why
    notes: tuple[str, ...]
    dry_run: bool
    url: str | None = None
    commit: str | None = None
    changed: bool | None = None

    def facts(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {**asdict(self), "bytes": sum(self.files.values())}

    def shown(self) -> "RenderableType":
        """What the command line prints."""
        from rich.console import Group
        from rich.table import Table

        table = Table("file", "size", "left out")
        for name, size in self.files.items():
            table.add_row(name, report.size(size), "")
        for name, why in self.left_out.items():
            table.add_row(name, "", why)
        seen = "private" if self.private else "public"
        total = f"{len(self.files)} files, {report.size(sum(self.files.values()))}"
        if self.dry_run:
            end = f"Would push {total} to {self.repo} ({self.branch}, {seen}): {self.message}"
        elif self.changed:
            end = f"Pushed {total} to {self.repo} ({self.branch}, {seen}): {self.url}"
        else:
            end = f"{self.repo} ({self.branch}, {seen}) has all of it already: {self.url}"
        return Group(table, *(f"- {note}" for note in self.notes), end)


def push(
    run: Path | str,
    repo: str,
    *,
    public: bool = False,
    branch: str = constants.DEFAULT_REVISION,
    message: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    dry_run: bool = False,
    console: Console | None = None,
) -> Pushed:
    """Put the checkpoint of the run folder into the model `repo` (user/name) of the hub.

    A repository that is not there yet is made, private unless `public`; who sees one that is there
    is never changed. `base_model` and `license` are for the card, where they are not known.
    `dry_run` asks the hub nothing. Raises BadInput for what is no run, a name or token that the
    hub refuses and texts that hold a token, Unreachable where the hub is.
    """
    console = console or Console(stderr=True, quiet=True)
    folder = Path(run).expanduser()
    manifest = push_files.manifest_of(folder)
    _check_target(repo, branch)
    found, left_out = push_files.chosen(folder)
    push_files.check(folder, manifest, found)
    rows = rowfile.read(folder / "rows.jsonl")[0] if (folder / "rows.jsonl").exists() else []
    data, body = _card(folder, manifest, rows, repo, branch)
    if base_model:
        data |= {"base_model": base_model, "base_model_relation": "finetune"}
    if license:
        data = {k: v for k, v in data.items() if k not in ("license_name", "license_link")}
        data |= {"license": license}
    texts = {"README.md": f"{card.front(data)}\n{body}"}
    notes = _notes(manifest, data)
    summary = message or f"Narrowed to {_short(manifest)} by llm-narrow {__version__}"
    push_files.check_text("The card", texts["README.md"])
    push_files.check_text("The message", summary)

    def done(**told: Any) -> Pushed:
        sizes = {name: path.stat().st_size for name, path in found.items()}
        sizes |= {name: len(text.encode()) for name, text in texts.items()}
        return Pushed(
            repo, branch, not public, summary, dict(sorted(sizes.items())), left_out, tuple(notes),
            dry_run, **told,
        )  # fmt: skip

    if dry_run:
        return done()
    token = _token()
    api = HfApi(token=token)
    with _talking(console, repo, branch, token) as warned:
        there = _there(api, repo, public)
        if not there:
            api.create_repo(repo, private=not public)
        if branch != constants.DEFAULT_REVISION:
            api.create_branch(repo, branch=branch, exist_ok=True)
        before = api.model_info(repo, revision=branch)
        if of_base := _of_base(api, data):
            data = {**of_base, **data}
            texts["README.md"], notes = f"{card.front(data)}\n{body}", _notes(manifest, data)
        console.print(f"Pushing {len(found)} files to {repo} ({branch})", highlight=False)
        adding = [
            CommitOperationAdd(name, texts[name].encode() if name in texts else path)
            for name, path in {**dict.fromkeys(texts, Path()), **found}.items()
        ]
        held = [file.rfilename for file in before.siblings or ()]
        gone = [name for name in held if push_files.stale(name) and name not in found]
        made = api.create_commit(
            repo, [*adding, *(CommitOperationDelete(name) for name in gone)],
            commit_message=summary, revision=branch,
        )  # fmt: skip
    notes += [*warned, *(f"{name} of an earlier push was removed there." for name in gone)]
    return done(
        url=f"{api.endpoint}/{repo}" + (f"/tree/{branch}" if branch != "main" else ""),
        commit=made.oid, changed=made.oid != before.sha,
    )  # fmt: skip


def _check_target(repo: str, branch: str) -> None:
    try:
        validate_repo_id(repo)
        whole = "/" in repo
    except HFValidationError:
        whole = False
    if not whole:
        raise BadInput(
            f"{repo!r} is no name for a model on the hub: user/name, of letters, digits, '-', '_' "
            "and '.'. Give such a one."
        )
    if re.fullmatch(r"[0-9a-f]{40}", branch) or not re.fullmatch(r"[\w][\w./-]*", branch):
        raise BadInput(f"{branch!r} is no branch that can be pushed to. Name one, such as main.")


def _card(
    folder: Path, manifest: Mapping[str, Any], rows: Sequence[rowfile.Row], repo: str, branch: str
) -> tuple[dict[str, Any], str]:
    """The head of the card, and its text with what loads the model from the hub.

    What somebody has written at the head of the run's own card stays; the figures are those of now.
    """
    file = folder / "model" / "README.md"
    text = file.read_text(encoding="utf-8") if file.exists() else card.model_card(manifest, rows)
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        told = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError:
        told = None
    if not isinstance(told, dict):
        raise BadInput(f"{file} begins with what is no YAML mapping. Mend its first lines.")
    now = card.metadata(manifest, rows, name=repo.partition("/")[2])
    own = {key: value for key, value in told.items() if key != "model-index"}
    body = text[head.end() :] if head else f"\n{text}"
    named = f'"{repo}"'
    if branch != constants.DEFAULT_REVISION:
        named += f', revision="{branch}"'
    return {**now, **own}, body.replace(card.UNEVEN, ON_THE_HUB).replace('"FOLDER"', named)


def _notes(manifest: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    """What a user may want to mend before it is seen."""
    named = (at(manifest, "command"), at(manifest, "model", "name"), at(manifest, "domain", "name"))
    places = dict.fromkeys(PLACE.findall(" ".join(map(str, named))))
    notes = []
    if places:
        notes.append(
            f"manifest.json, recipe.yaml and the card name places here: {', '.join(places)}"
        )
    if "license" not in data:
        notes.append("The card names no licence: give --license with that of the whole model.")
    if "base_model" not in data:
        notes.append("The card names no whole model: give --base-model with its id on the hub.")
    return notes


def _short(manifest: Mapping[str, Any]) -> str:
    return Path(str(at(manifest, "domain", "name") or "a domain")).name


def _token() -> str:
    if constants.is_offline_mode():
        raise Unreachable(
            "HF_HUB_OFFLINE is set: the hub is not asked anything. Unset it to push, or look first "
            "with --dry-run."
        )
    try:
        token = huggingface_hub.get_token()
    except Exception as error:  # some are exchanged over the network when asked for
        raise Unreachable(f"No token for the hub: {first_line(error)} {LOG_IN}.") from error
    if not token:
        raise BadInput(f"There is no token for the hub. {LOG_IN} to one that may write.")
    return token


def _there(api: HfApi, repo: str, public: bool) -> bool:
    """Whether the repository is there; BadInput where others would see more or less than asked."""
    try:
        found = api.model_info(repo)
    except RepositoryNotFoundError:
        return False
    if found.private is public:
        how = "private" if found.private else "public"
        way = "Leave out --public" if found.private else "Give --public to push there all the same"
        raise BadInput(
            f"{repo} exists and is {how}, which a push does not change. {way}, or choose another "
            "name."
        )
    return True


def _of_base(api: HfApi, data: Mapping[str, Any]) -> dict[str, Any]:
    """Licence and language as the whole model's card has them; nothing where it has none."""
    if "base_model" not in data or {"license", "language"} <= data.keys():
        return {}
    try:
        told = api.model_info(data["base_model"]).card_data
    except (HfHubHTTPError, HFValidationError):
        return {}
    keys = [] if "license" in data else ["license", "license_name", "license_link"]
    found = {key: told.get(key) for key in (*keys, "language")} if told else {}
    return {key: value for key, value in found.items() if value}


@contextmanager
def _talking(console: Console, repo: str, branch: str, token: str) -> Iterator[list[str]]:
    """Errors of the client in the user's terms, its warnings as a list, its bars on terminals."""
    bars, level = are_progress_bars_disabled(), hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    if console.quiet or not console.is_terminal:
        disable_progress_bars()
    told: list[str] = []
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield told
        told += [str(one.message).replace(token, "…") for one in warned]
    except NarrowError:
        raise
    except Exception as error:  # of the client, of its HTTP client, of its storage
        raise _told(error, repo, branch, token) from error
    finally:
        hub_logging.set_verbosity(level)
        if not bars:
            enable_progress_bars()


def _told(error: Exception, repo: str, branch: str, token: str) -> NarrowError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    told = getattr(error, "server_message", None) or str(error) or type(error).__name__
    said = textwrap.shorten(told.replace(token, "…"), 240, placeholder=" …").rstrip(".")
    if isinstance(error, OfflineModeIsEnabled):
        return Unreachable("HF_HUB_OFFLINE is set: the hub is not asked anything. Unset it.")
    if isinstance(error, RevisionNotFoundError):
        return BadInput(f"{repo} has no branch {branch!r} on the hub. Give one that it has.")
    if status == 401:
        return BadInput(f"The hub refuses the token (401: {said}). {LOG_IN} to one that is valid.")
    if status == 403:
        return BadInput(
            f"The token may not write to {repo} (403: {said}). {LOG_IN} to one with that right, or "
            "push to a name of your own."
        )
    if isinstance(error, ValueError) or (status and status < 500 and status != 429):
        return BadInput(f"The hub refuses {repo}: {said}. Mend that, and push again.")
    return Unreachable(
        f"{repo}: the hub cannot be reached ({said}). Push again when it can: what has arrived is "
        "not sent twice. --dry-run needs no hub."
    )
