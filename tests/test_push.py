"""Runs on the hub, by the real client against a small hub on loopback, and back again."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import llm_narrow
from commands import Finished, refused
from hub import client_env, serve
from hub_pushes import Pushes
from llm_narrow import certificate, checkpoint, push
from llm_narrow.errors import BadInput, NarrowError, Unreachable
from proof import SMALL

TOKEN = "hf_" + "aB3" * 11 + "x"
READER = "hf_" + "rD4" * 11 + "y"
UP = {
    "README.md", "config.json", "generation_config.json", "keep.safetensors", "manifest.json",
    "model.safetensors", "model.safetensors.index.json", "recipe.yaml", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


@dataclass(frozen=True)
class Hub:
    url: str
    root: Path
    pushes: Pushes

    def repo(self, name: str, branch: str = "main") -> Path:
        whole = self.root / "models" / name
        return whole if branch == "main" else whole.parent / f".{whole.name}@{branch}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client, here and in other processes, is turned to with a token that writes."""
    constants = huggingface_hub.constants
    root = tmp_path / "hub"
    pushes = Pushes(root, TOKEN, (READER,))
    with serve(root, pushes) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        for name, value in client_env(url, tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield Hub(url, root, pushes)


@pytest.fixture
def own(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(finished.folder, tmp_path / "own"))


@pytest.fixture(scope="module")
def made(
    model_folder: Path, domain_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Runs whose models need more than stock transformers, or another tokenizer."""
    settings: dict[str, dict[str, Any]] = {
        "uneven": {"sparsity": 0.5, "allocation": "global", "multiple": 1},
        "trimmed": {"sparsity": 0.5, "vocabulary": "domain"},
    }

    def run(kind: str) -> Path:
        out = tmp_path_factory.mktemp(kind) / "run"
        llm_narrow.prune(model=str(model_folder), domain=str(domain_folder), out=out,
                         **settings[kind], **SMALL)  # fmt: skip
        return out

    return run


def command(*words: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, which asks the hub of the environment."""
    return subprocess.run(
        [sys.executable, "-m", "llm_narrow", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_goes_up_and_comes_back(
    hub: Hub, finished: Finished, domain_folder: Path, tmp_path: Path
) -> None:
    before = files_of(finished.folder)
    done = command("push", finished.folder, "someone/tiny-text", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["private"] and told["changed"] and told["branch"] == "main"
    assert told["url"] == f"{hub.url}/someone/tiny-text"
    assert {*told["files"]} == UP
    assert told["bytes"] == sum(told["files"].values())
    (created,) = hub.pushes.created
    assert created["visibility"] == "private"
    assert (created["organization"], created["name"]) == ("someone", "tiny-text")
    (commit,) = hub.pushes.commits
    assert {*commit["files"]} == UP and not commit["gone"]
    assert commit["summary"] == f"Narrowed to text by llm-narrow {llm_narrow.__version__}"
    there = hub.repo("someone/tiny-text")
    assert {p.name for p in there.iterdir()} == UP | {".gitattributes", ".private"}
    for name in UP - {"README.md"}:
        assert (there / name).read_bytes() == before[f"model/{name}"], name
    assert told["files"]["README.md"] == (there / "README.md").stat().st_size

    # Nowhere but in the headers.
    assert TOKEN not in done.stdout + done.stderr
    assert files_of(finished.folder) == before
    assert not any(TOKEN.encode() in data for data in files_of(tmp_path).values())

    looked = command("inspect", "someone/tiny-text", "--json")
    assert looked.returncode == 0, looked.stderr
    place = next((tmp_path / "home/hub/models--someone--tiny-text/snapshots").iterdir())
    assert_same(place, finished.folder / "model")
    again = command(
        "prune", "--model", "someone/tiny-text", "--domain", domain_folder, "--dry-run", "--json",
        "--length", 32, "--calibration-tokens", 512, "--held-out-tokens", 256,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    model = json.loads(again.stdout)["model"]
    assert model["sha256"] == checkpoint.weights_sha256(finished.folder / "model")


def assert_same(place: Path, folder: Path) -> None:
    """The tensors, in the folder and as they are loaded."""
    held, kept = load_file(place / "model.safetensors"), load_file(folder / "model.safetensors")
    assert held.keys() == kept.keys()
    assert all(torch.equal(held[name], kept[name]) for name in kept)
    ours, theirs = checkpoint.load(folder), checkpoint.load(place)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["uneven", "trimmed"])
def test_models_that_need_more_go_too(hub: Hub, made: Any, kind: str, tmp_path: Path) -> None:
    run = made(kind)
    told = push.push(run, f"someone/{kind}")
    assert ("vocabulary.safetensors" in told.files) is (kind == "trimmed")
    card = (hub.repo(f"someone/{kind}") / "README.md").read_text()
    if kind == "uneven":
        assert f'llm_narrow.load("someone/{kind}")' in card
        assert "llm-narrow has to be installed" in card and "AutoModel" not in card
    else:
        assert f'AutoModelForCausalLM.from_pretrained("someone/{kind}")' in card
        assert "the tokenizer here gives other numbers than the original's" in card
    assert "FOLDER" not in card
    code = (
        "import sys, torch, llm_narrow\n"
        "loaded = llm_narrow.load(sys.argv[1])\n"
        "own = llm_narrow.load(sys.argv[2])\n"
        "ids = torch.tensor([own.tokenizer('the unit group score').input_ids])\n"
        "assert loaded.tokenizer('the unit group score').input_ids == ids[0].tolist()\n"
        "assert torch.equal(loaded.model(ids).logits, own.model(ids).logits)\n"
        "print(loaded.folder)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"someone/{kind}", str(run)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "home") in done.stdout
    needed = "keep.safetensors" if kind == "uneven" else "vocabulary.safetensors"
    assert (Path(done.stdout.strip()) / needed).is_file()


def test_a_dry_run_asks_nothing(hub: Hub, own: Path, run: Any, monkeypatch: Any) -> None:
    monkeypatch.delenv("HF_TOKEN")
    for name in ("logs/events.1", "state/step-00000040/state.json", "model/pytorch_model.bin",
                 "model/modeling_own.py", ".cache/x", "model/notes.txt"):  # fmt: skip
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text("x")
    (own / "model/tokenizer.model").symlink_to("/etc/hostname")
    done = run("push", own, "someone/text", "--dry-run", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["dry_run"] and told["url"] is None and told["changed"] is None
    assert {*told["files"]} == UP
    why = {
        "logs": "log of a training", "state": "state of a training", ".cache": "cache",
        "model/pytorch_model.bin": "pickled: can run any code when opened",
        "model/modeling_own.py": "code", "model/notes.txt": "not of the checkpoint",
        "model/tokenizer.model": "a link to outside of the run",
        "report.html": "report; the card has the figures",
        "scores.safetensors": "scores, for more cuts of the whole model",
        "recipe.yaml": "goes up from model/",
    }  # fmt: skip
    assert why.items() <= told["left_out"].items()
    assert hub.pushes.log == []
    shown = run("push", own, "someone/text", "--dry-run", "--public", "--branch", "v2")
    text = " ".join(shown.out.split())
    assert f"Would push {len(UP)} files" in text and "someone/text (v2, public)" in text
    assert "no licence: give --license" in text and str(own.parent.parent)[:8] in text
    assert hub.pushes.log == []


def test_only_what_differs_goes_up_again(hub: Hub, own: Path) -> None:
    first = push.push(own, "someone/text")
    weights = len(hub.pushes.sent("PUT", "stored"))
    assert weights == 2 and first.changed
    again = push.push(own, "someone/text")
    assert not again.changed and again.commit == first.commit
    assert len(hub.pushes.commits) == 1 and len(hub.pushes.sent("PUT", "stored")) == weights
    card = own / "model/README.md"
    card.write_text(card.read_text() + "\nMore.\n")
    third = push.push(own, "someone/text", message="Say more")
    assert third.changed and third.commit != first.commit
    assert hub.pushes.commits[1] == {"summary": "Say more", "files": ["README.md"], "gone": []}
    assert len(hub.pushes.sent("PUT", "stored")) == weights


def test_a_push_that_was_stopped_goes_on(hub: Hub, own: Path) -> None:
    hub.pushes.most = (own / "model/keep.safetensors").stat().st_size
    with pytest.raises(Unreachable, match="what has arrived is not sent twice"):
        push.push(own, "someone/text")
    assert hub.pushes.commits == [] and len(hub.pushes.stored) == 1  # keep.safetensors
    hub.pushes.most = None
    hub.pushes.log.clear()
    assert push.push(own, "someone/text").changed
    (sent,) = hub.pushes.sent("PUT", "stored")
    assert sent == (own / "model/model.safetensors").stat().st_size
    assert len(hub.pushes.created) == 1


def test_files_of_another_model_do_not_stay(hub: Hub, own: Path) -> None:
    certificate.certify(own)
    told = push.push(own, "someone/text")
    assert {"certificate.json", "certificate.md"} <= told.files.keys()
    there = hub.repo("someone/text")
    assert (there / "certificate.md").is_file()
    (there / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier one")
    (there / "chat_template.jinja").write_text("of an earlier one")
    (there / "NOTICE").write_text("by hand")
    for name in ("certificate.json", "certificate.md", "model/certificate.json"):
        (own / name).unlink()
    again = push.push(own, "someone/text")
    gone = {"certificate.json", "certificate.md", "model-00001-of-00002.safetensors",
            "chat_template.jinja"}  # fmt: skip
    assert {*hub.pushes.commits[-1]["gone"]} == gone
    assert not any((there / name).exists() for name in gone) and (there / "NOTICE").is_file()
    assert sum("of an earlier push was removed" in note for note in again.notes) == len(gone)


def test_branches(hub: Hub, own: Path) -> None:
    push.push(own, "someone/text")
    told = push.push(own, "someone/text", branch="smaller")
    assert told.url == f"{hub.url}/someone/text/tree/smaller"
    assert {*hub.pushes.commits[-1]["files"]} == {"README.md"}  # it names the branch
    card_there = (hub.repo("someone/text", "smaller") / "README.md").read_text()
    assert '"someone/text", revision="smaller"' in card_there
    assert not push.push(own, "someone/text", branch="smaller").changed
    (own / "model/recipe.yaml").write_text("seed: 3\n")
    assert push.push(own, "someone/text", branch="smaller").changed
    assert (hub.repo("someone/text", "smaller") / "recipe.yaml").read_text() == "seed: 3\n"
    assert (hub.repo("someone/text") / "recipe.yaml").read_text() != "seed: 3\n"
    for wrong in ("a" * 40, "with space", "-x"):
        with pytest.raises(BadInput, match="no branch that can be pushed to"):
            push.push(own, "someone/text", branch=wrong)


def test_who_sees_a_repository_never_changes(hub: Hub, own: Path) -> None:
    push.push(own, "someone/open", public=True)
    assert hub.pushes.created[-1]["visibility"] == "public"
    push.push(own, "someone/closed")
    with pytest.raises(BadInput, match=r"open exists and is public, .* Give --public"):
        push.push(own, "someone/open")
    with pytest.raises(BadInput, match=r"closed exists and is private, .* Leave out --public"):
        push.push(own, "someone/closed", public=True)
    assert not push.push(own, "someone/open", public=True).changed
    assert len(hub.pushes.created) == 2


def test_the_card_says_what_the_hub_reads(hub: Hub, own: Path) -> None:
    whole = hub.repo("big/whole")
    whole.mkdir(parents=True)
    (whole / "README.md").write_text(
        "---\nlicense: other\nlicense_name: big\nlanguage:\n- en\ntags: [x]\n---\n"
    )
    manifest = json.loads((own / "manifest.json").read_text())
    manifest["domain"]["name"] = "python-github"
    (own / "manifest.json").write_text(json.dumps(manifest))
    told = push.push(own, "someone/text", base_model="big/whole")
    card = ModelCard((hub.repo("someone/text") / "README.md").read_text())
    data = card.data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "big")
    assert data["base_model"] == "big/whole" and data["base_model_relation"] == "finetune"
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert data["language"] == "code" and data["datasets"] == ["codeparrot/codeparrot-clean"]
    assert {"llm-narrow", "pruned", "not-recovered"} <= {*data["tags"]}
    rows = [json.loads(line) for line in (own / "rows.jsonl").read_text().splitlines()]
    found = {one.metric_type: one for one in card.data.eval_results}
    assert found.keys() == {"bits_per_byte", "loss", "accuracy"}
    for name, one in found.items():
        assert one.metric_value == pytest.approx(rows[-1][name], abs=1e-4)
        assert one.dataset_split == "held_out"
    assert card.data.model_name == "text"
    assert not any("--license" in note or "--base-model" in note for note in told.notes)
    assert 'from_pretrained("someone/text")' in card.text


def test_what_was_written_into_a_card_stays(hub: Hub, own: Path) -> None:
    file = own / "model/README.md"
    head, text = file.read_text().removeprefix("---\n").split("\n---\n", 1)
    mine = {**yaml.safe_load(head), "language": "de", "tags": ["mine"], "license": "mit"}
    file.write_text(f"---\n{yaml.safe_dump(mine)}---\n{text}\nBy hand.\n")
    push.push(own, "someone/text")
    card = ModelCard((hub.repo("someone/text") / "README.md").read_text())
    assert (card.data.language, card.data.tags, card.data.license) == ("de", ["mine"], "mit")
    assert card.data.eval_results and "By hand." in card.text
    push.push(own, "someone/text", license="bsd-3-clause")
    card = ModelCard((hub.repo("someone/text") / "README.md").read_text())
    assert card.data.license == "bsd-3-clause"
    file.write_text("---\n- a\n- list\n---\ntext")
    with pytest.raises(BadInput, match="begins with what is no YAML mapping"):
        push.push(own, "someone/text")
    file.unlink()
    push.push(own, "someone/text", license="mit")
    assert "# tiny-llama narrowed to" in (hub.repo("someone/text") / "README.md").read_text()


def test_metadata_that_the_hub_refuses_is_told(hub: Hub, own: Path) -> None:
    file = own / "model/README.md"
    file.write_text("---\nlicense: [a, b]\n---\ntext\n")
    with pytest.raises(BadInput, match="license must be a string"):
        push.push(own, "someone/text")
    assert hub.pushes.commits == []


def broken(own: Path, how: str) -> Path:
    """The run with something wrong."""
    if how == "no folder":
        return own / "nowhere"
    if how == "the model folder":
        return own / "model"
    if how == "no run":
        (own / "manifest.json").unlink()
    elif how == "pickled":
        (own / "model/model.safetensors").rename(own / "model/pytorch_model.bin")
    elif how == "no tokenizer":
        for file in (own / "model").glob("tokenizer*"):
            file.unlink()
    elif how == "other weights":
        weights = load_file(own / "model/model.safetensors")
        name = next(iter(weights))
        from safetensors.torch import save_file

        save_file({**weights, name: weights[name] + 1}, own / "model/model.safetensors")
    elif how == "other certificate":
        certificate.certify(own)
        text = (own / "model/certificate.json").read_text()
        sha256 = checkpoint.weights_sha256(own / "model")
        (own / "model/certificate.json").write_text(text.replace(sha256, "f" * 64))
    elif how == "a link":
        (own / "model").rename(own.parent / "elsewhere")
        (own / "model").symlink_to(own.parent / "elsewhere", target_is_directory=True)
    elif how == "token of the tokenizer":
        (own / "model/chat_template.jinja").write_text(f"{{# {TOKEN} #}}")
    elif how == "token inside":
        with (own / "model/recipe.yaml").open("a") as file:
            file.write(f"# {TOKEN}\n")
    return own


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("no folder", "is no folder. Give a run folder"),
        ("the model folder", "is not a run folder: it has no model. Give "),
        ("no run", "is not a run folder: it has no manifest.json. Give one that"),
        ("pickled", "is no whole model: model*.safetensors is missing"),
        ("no tokenizer", "is no whole model: tokenizer* is missing"),
        ("other weights", "than manifest.json says"),
        ("other certificate", "than certificate.json says"),
        ("token inside", "recipe.yaml of "),
        ("token of the tokenizer", "chat_template.jinja of "),
        ("a link", "is a link: what it leads to is not part of the run"),
    ],
)
def test_what_is_no_whole_run_is_refused(
    hub: Hub, own: Path, run: Any, how: str, told: str
) -> None:
    done = run("push", broken(own, how), "someone/text")
    refused(done, told)
    assert hub.pushes.log == [] and TOKEN not in done.err


@pytest.mark.parametrize("name", ["text", "a/b/c", "some one/text", "someone/te..xt", "/text"])
def test_bad_names_are_refused(hub: Hub, own: Path, run: Any, name: str) -> None:
    refused(run("push", own, name), f"{name!r} is no name for a model on the hub: user/name")
    assert hub.pushes.log == []


def test_tokens_that_will_not_do(
    hub: Hub, own: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "no" * 16)
    done = run("push", own, "someone/text")
    refused(done, "The hub refuses the token (401", "Log in with `hf auth login`, or set HF_TOKEN")
    assert "nono" not in done.err
    monkeypatch.setenv("HF_TOKEN", READER)
    done = run("push", own, "someone/text")
    refused(done, "The token may not write to someone/text (403", "push to a name of your own")
    assert READER not in done.err
    monkeypatch.delenv("HF_TOKEN")
    hub.pushes.log.clear()
    refused(run("push", own, "someone/text"), "There is no token for the hub. Log in with")
    assert hub.pushes.log == [] and hub.pushes.commits == []


def test_a_hub_that_cannot_be_asked(
    hub: Hub, own: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(run("push", own, "someone/text"), "HF_HUB_OFFLINE is set", "Unset it to push")
    assert run("push", own, "someone/text", "--dry-run").code == 0
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert hub.pushes.log == []
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    done = run("push", own, "someone/text", "--debug")
    assert "someone/text: the hub cannot be reached" in done.err.splitlines()[-1]
    assert done.code == 2 and TOKEN not in done.err


def test_errors_never_hold_the_token(hub: Hub, own: Path, monkeypatch: Any) -> None:
    def fail(*args: object, **given: object) -> None:
        raise OSError(f"cannot send Bearer {TOKEN}\nmore")

    monkeypatch.setattr(push.HfApi, "create_commit", fail)
    with pytest.raises(NarrowError, match="cannot send Bearer …") as told:
        push.push(own, "someone/text")
    assert TOKEN not in str(told.value)
