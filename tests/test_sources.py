"""Sources: folders, files of rows and hub data sets, and what a user is told of each."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hub
from folders import sentences
from llm_narrow import cleaning, sources
from llm_narrow.domains import PARTS, load
from llm_narrow.errors import BadInput
from test_domains import projects, python_file, texts

# Folders --------------------------------------------------------------------------------------


def test_a_folder_is_split_by_top_folder(domain_folder: Path) -> None:
    domain = load(str(domain_folder))
    assert set(projects(domain)) == {f"project{i}" for i in range(10)}
    assert sum(map(len, domain.documents.values())) == 40


@pytest.mark.parametrize("tops", [["one", "two"], ["one", "one", "one", "one", "two", "three"]])
def test_a_folder_of_few_or_uneven_top_folders_is_split_by_file(
    tmp_path: Path, tops: list[str]
) -> None:
    for number in range(24):
        file = tmp_path / tops[number % len(tops)] / f"{number}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(sentences(number, 10))
    assert len(projects(load(str(tmp_path)))) == 24


def test_a_folder_with_links_hidden_files_and_other_encodings(tmp_path: Path) -> None:
    root = tmp_path / "src"
    for number in range(6):
        (root / f"p{number}").mkdir(parents=True)
        (root / f"p{number}" / "mod.rs").write_text(sentences(number, 10))
    (root / "p0" / "loop").symlink_to(root, target_is_directory=True)
    (root / "p0" / "gone.rs").symlink_to(root / "nothing")
    (root / ".git").mkdir()
    (root / ".git" / "x.rs").write_text(sentences(50, 10))
    (root / "p1" / ".hidden.rs").write_text(sentences(51, 10))
    (root / "node_modules").mkdir()
    (root / "node_modules" / "x.rs").write_text(sentences(52, 10))
    (root / "p2" / "logo.rs").write_bytes(b"\x89PNG\0\0")
    (root / "p3" / "latin.rs").write_bytes("é".encode("latin-1"))
    (root / "p4" / "notes.md").write_text(sentences(53, 10))
    os.mkfifo(root / "p5" / "pipe.rs")
    (root / os.fsdecode(b"p5/\xff.rs")).write_text(sentences(54, 10))
    for _ in range(2):  # the second time from the cache
        domain = load(str(root), glob="**/*.rs")
        assert texts(domain) == sorted(sentences(n, 10) for n in [*range(6), 54])
        assert domain.dropped == {"binary": 1, "not UTF-8": 1}


@pytest.mark.parametrize(
    ("pattern", "fits", "fits_not"),
    [
        ("**/*", ["a", "a/b.c"], []),
        ("**/*.rs", ["a.rs", "x/y/a.rs"], ["a.rsx", "a/rs"]),
        ("*.rs", ["a.rs"], ["x/a.rs"]),
        ("./src/**", ["src/a", "src/b/c"], ["other/src/a"]),
        ("src/**/[!t]*.p?", ["src/a.py", "src/b/c.pl"], ["src/t.py", "src/a.p"]),
        ("a[0-9].(x)", ["a1.(x)"], ["ab.(x)", "a1.x"]),
    ],
)
def test_globs(pattern: str, fits: list[str], fits_not: list[str]) -> None:
    assert [path for path in fits + fits_not if sources.matches(path, pattern)] == fits


def test_a_file_that_cannot_be_read_is_dropped() -> None:
    def refuse() -> bytes:
        raise PermissionError

    assert cleaning.clean(sources.Raw("p", "p/x", 1, refuse), python=False) == "cannot be read"


# Files of rows --------------------------------------------------------------------------------

ROWS = [{"repo": f"r{i % 12}", "content": sentences(i, 8), "stars": i} for i in range(60)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    from pyarrow import csv, parquet

    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        csv.write_csv(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        data = "".join(json.dumps(row) + "\n\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.csv", "x.parquet"])
def test_rows_of_every_kind_of_file(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, ROWS)
    domain = load(str(path), project_column="repo")
    assert texts(domain) == sorted(row["content"] for row in ROWS)
    assert set(projects(domain)) == {f"r{i}" for i in range(12)}
    assert len(projects(load(str(path)))) == 60
    repos = load(str(path), text_column="repo")
    assert len(texts(repos)) == 12
    assert repos.dropped == {"duplicate": 48}


def test_json_with_one_object_on_each_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", ROWS).rename(tmp_path / "x.json")
    assert len(texts(load(str(path)))) == 60


def test_rows_without_usable_text_are_counted(tmp_path: Path) -> None:
    odd = [{"text": None}, {"text": 5}, {"other": "x"}, {"text": "\ud800"}, {"text": "a\0"},
           {"text": " "}]  # fmt: skip
    rows = [{"text": sentences(i, 3)} for i in range(30)] + odd
    domain = load(str(write_rows(tmp_path / "x.jsonl", rows)))
    assert len(texts(domain)) == 30
    assert domain.dropped == {"binary": 1, "empty": 1, "no text": 3, "not UTF-8": 1}


def test_a_text_file_is_cut_at_its_marks_or_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("<|endoftext|>".join(f"text {i}" for i in range(9)))
    assert texts(load(str(path))) == [f"text {i}" for i in range(9)]
    paragraphs = [sentences(i, 60) + "\n" for i in range(40)]
    path.write_text("".join(paragraphs))
    domain = load(str(path))
    assert 5 < len(texts(domain)) < 40
    pieces = [d for part in PARTS for d in domain.documents[part]]
    assert "".join(d.text for d in sorted(pieces, key=lambda d: d.path)) == "".join(paragraphs)
    path.write_text("word " * 20 + "\n" + "x\n" * 40_000)
    with pytest.raises(BadInput, match="too little data"):  # all the same: only copies
        load(str(path))


# The hub --------------------------------------------------------------------------------------

LOAD = """
import json, sys
from llm_narrow import domains, sources
from llm_narrow.errors import NarrowError
found = []
for name, said in json.loads(sys.argv[1]):
    try:
        d = domains.load(name, **said)
    except NarrowError as error:
        found.append({"error": type(error).__name__, "told": str(error)})
    else:
        there = [doc for part in domains.PARTS for doc in d.documents[part]]
        rows = [row for row in domains.known() if row.name == name]
        found.append({"texts": sorted(doc.text for doc in there), "dropped": dict(d.dropped),
                      "projects": sorted({doc.project for doc in there}),
                      "cached": [row.cached for row in rows]})
print(json.dumps(found))
"""


def load_apart(env: dict[str, str], *asked: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """`load` what is asked in a process of its own, with the given environment."""
    command = [sys.executable, "-c", LOAD, json.dumps(asked)]
    own = {**os.environ, **env}
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_hub_data_sets(tmp_path: Path) -> None:
    root = tmp_path / "root" / "datasets"
    for name in ("codeparrot/codeparrot-clean", "me/broken", "me/closed", "me/empty",
                 "me/two"):  # fmt: skip
        (root / name).mkdir(parents=True)
    rows = [
        {"repo_name": f"r/{i % 20}", "path": f"x{i}.py", "content": python_file(i)}
        for i in range(80)
    ]
    rows[3]["path"] = "tests/test_x.py"
    rows[4]["content"] = "print 'python 2'"
    write_rows(root / "codeparrot" / "codeparrot-clean" / "data.jsonl", rows)
    write_rows(root / "me" / "closed" / "data.jsonl", rows)
    (root / "me" / "closed" / ".gated").touch()
    (root / "me" / "broken" / "data.jsonl").write_text('{"text": "a"}\n{broken\n')
    (root / "me" / "empty" / "README.md").write_text("nothing yet")
    for number, part in enumerate(("first", "second")):
        own = [{"text": python_file(100 * number + i)} for i in range(1, 41)]
        write_rows(root / "me" / "two" / f"{part}.jsonl", own)
    (root / "me" / "two" / "README.md").write_text(
        "---\nconfigs:\n- config_name: first\n  data_files: first.jsonl\n"
        "- config_name: second\n  data_files: second.jsonl\n---\n"
    )
    name = "codeparrot/codeparrot-clean"
    with hub.serve(root.parent) as url:
        env = hub.client_env(url, tmp_path / "home")
        second, unsaid, whole, few, columns, *errors = load_apart(
            env,
            ("me/two:second", {}),
            ("me/two", {}),
            ("python-github", {}),
            (name, {"text_column": "content", "max_documents": 30}),
            (name, {"text_column": "code", "project_column": "repo"}),
            ("me/broken", {}),
            ("me/closed", {}),
            ("me/empty", {}),
            ("me/nothing", {}),
        )
    assert second["texts"] == sorted(python_file(100 + i) for i in range(1, 41))
    told = "'me/two' has several configurations: first, second. Name one, as me/two:first."
    assert unsaid == {"error": "BadInput", "told": f"Data set {told}"}
    assert whole["texts"] == sorted(r["content"] for i, r in enumerate(rows) if i not in (3, 4))
    assert whole["dropped"] == {"does not parse": 1, "test": 1}
    assert whole["projects"] == sorted(f"r/{i}" for i in range(20))
    assert whole["cached"] == [True]
    assert few["texts"] == sorted(row["content"] for row in rows[:30])
    assert "no column 'code' (--text-column) and no column 'repo'" in columns["told"]
    assert "It has: repo_name, path, content." in columns["told"]
    assert {error["error"] for error in errors} == {"BadInput"}
    assert "'me/broken' cannot be read: JSON parse error" in errors[0]["told"]
    for error, closed in zip(errors[1:], ("me/closed", "me/empty", "me/nothing"), strict=True):
        assert f"There is no open data set '{closed}'" in error["told"]

    # The server is gone: what was streamed once is still there, the rest cannot be reached.
    again, beyond = load_apart(
        {**env, "HF_HUB_OFFLINE": "1"}, ("python-github", {}), ("me/other", {})
    )
    assert again == whole
    assert beyond["error"] == "Unreachable"
    assert "'me/other' cannot be reached now: " in beyond["told"]
    assert "Local ways: --domain python-stdlib, a folder" in beyond["told"]


# What a user is told --------------------------------------------------------------------------


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "options", "told"),
    [
        ("no/such", None, {}, r"There is no folder or file .*no/such. Check the path"),
        ("no.jsonl", None, {}, r"There is no folder or file .*no\.jsonl"),
        ("x.rs", "fn", {}, r"a single file must be \.csv, \.json, .*their folder and a --glob"),
        ("x.csv.gz", "a", {}, r"\(\.json, \.jsonl and \.txt may be gzipped\)"),
        ("x.jsonl", '{"body": "a", "id": 1}', {},
         r"no column text nor content nor code\. It has: body, id\. Name one with --text-column"),
        ("x.jsonl", '{"body": "a"}', {"text_column": "b", "project_column": "c"},
         r"no column 'b' \(--text-column\) and no column 'c' \(--project-column\)\. It has: body"),
        ("x.jsonl", '{"text": "a"}\n{"text":', {}, r"x\.jsonl: line 2 is not valid JSON"),
        ("x.jsonl", b'{"text": "\xff"}', {}, r"x\.jsonl: line 1 is not valid JSON"),
        ("x.jsonl", "[1]", {}, r"x\.jsonl: line 1 is not an object with columns"),
        ("x.json", "[1, 2]", {}, r"x\.json must be a JSON list of objects"),
        ("x.json", "[", {}, r"x\.json is not valid JSON"),
        ("x.jsonl", "", {}, r"Nothing of domain .* can be used: it is empty"),
        ("x.parquet", "PAR1 no", {}, r"x\.parquet is not a whole parquet file"),
        ("x.csv", "", {}, r"x\.csv is not a valid CSV file"),
        ("x.csv", "a,b\n1\n", {}, r"x\.csv is not a valid CSV file"),
        ("x.txt", b"caf\xe9", {}, r"Nothing of domain .* \(left out: 1 not UTF-8\). Give UTF-8"),
        ("x.txt", "a", {"text_column": "t"}, r"is plain text and has no columns"),
        ("x.txt", "a", {"glob": "*"}, r"glob does not apply to the file .*; leave it out"),
        ("x.txt", "a", {"max_documents": 2}, r"max_documents must be at least 3, got 2"),
    ],
)  # fmt: skip
def test_files_that_cannot_serve(
    tmp_path: Path, name: str, data: bytes | str | None, options: dict[str, Any], told: str
) -> None:
    if data is not None:
        write(tmp_path / name, data)
    with pytest.raises(BadInput, match=told):
        load(str(tmp_path / name), **options)


@pytest.mark.parametrize(
    ("files", "options", "told"),
    [
        ([], {}, r"holds no files"),
        (["a/x.py", "b/y.py", "z.md"], {"glob": "*.py"},
         r"fits the glob '\*\.py'. Its 3 files end in \.py \(2\), \.md \(1\)\. "
         r"Try --glob '\*\*/\*\.py'"),
        (["a/x.py"], {"glob": "**/*.rs"}, r"end in \.py \(1\)\. Try --glob '\*\*/\*'"),
        (["a/x.py", "b.py"], {},
         r"too little data: 2 documents of 2 projects leave nothing for calibration, held_out"
         r".*give at least 3"),
        (["x.png", "y.png", "w.l1"], {},
         r"Nothing of domain .* \(left out: 2 binary, 1 not UTF-8\)"),
        (["x.py"], {"text_column": "t", "project_column": "p"},
         r"domain: 2 problems\n  text_column does not apply to the folder .*\n  project_column"),
    ],
)  # fmt: skip
def test_folders_that_cannot_serve(
    tmp_path: Path, files: list[str], options: dict[str, Any], told: str
) -> None:
    contents = {"png": b"\x89PNG\0", "l1": b"\xe9"}
    for name in files:
        write(tmp_path / name, contents.get(name.rpartition(".")[2], f"text of {name}"))
    with pytest.raises(BadInput, match=told):
        load(str(tmp_path), **options)
