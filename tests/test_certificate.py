"""Certificates: true to what was measured, of these weights only, of the documented form."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from commands import refused
from llm_narrow import certificate, checkpoint, page
from llm_narrow.certificate import BEGIN, END, certify, with_section
from llm_narrow.certificate_form import Certificate
from llm_narrow.certificate_text import relearning_text, selectivity_text
from llm_narrow.errors import BadInput
from llm_narrow.rows import read
from proof import audit_of, bench_of, matrix_of, write_runs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run. Do not write to it."""
    folder = tmp_path_factory.mktemp("certified")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_narrow.checkpoint.verify", lambda *args, **given: 0.0)
        patch.setattr("llm_narrow.outcome.draw", lambda *args: None)
        patch.setenv("LLM_NARROW_CACHE", str(folder / "cache"))
        yield write_runs(folder, "score")["score"]


@pytest.fixture
def run_folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_without_anything_else_it_says_what_the_run_knows(run_folder: Path) -> None:
    found = certify(run_folder, command="llm-narrow certify run").certificate
    before, after = read(run_folder / "rows.jsonl")[0]
    told = json.loads((run_folder / "manifest.json").read_text())
    d = found.on_domain
    assert [i.value for i in d.loss] == [before.loss.value, after.loss.value]
    assert after.bits_per_byte_ratio is not None
    assert d.increase.value == after.bits_per_byte_ratio.value - 1
    assert d.increase.low == after.bits_per_byte_ratio.low - 1
    assert d.sha256 == told["domain"]["sha256"]["held_out"]
    assert d.command == found.made_by == told["command"]
    assert found.model.sha256 == checkpoint.weights_sha256(run_folder / "model")
    assert found.original.sha256 == told["model"]["sha256"]
    assert found.model.bytes == (run_folder / "model/model.safetensors").stat().st_size
    assert found.stability == told["stability"]
    assert (found.method, found.recovered_tokens) == ("oneshot", 0)
    assert found.speed is found.selectivity is None
    assert set(found.not_measured) == {"speed", "selectivity", "off_domain", "relearning"}
    for command in found.not_measured.values():
        assert command.startswith("llm-narrow ")
        assert str(run_folder) in command


def test_the_file_has_the_documented_form(run_folder: Path) -> None:
    made = certify(run_folder).certificate
    for file in (run_folder / "certificate.json", run_folder / "model/certificate.json"):
        text = file.read_text()
        assert Certificate.model_validate_json(text) == made
        assert "NaN" not in text
    document = Path(__file__).parents[1].joinpath("docs/certificate.md").read_text()
    for key in Certificate.model_fields:
        assert f"`{key}`" in document, key
    assert "not measured" in (run_folder / "certificate.md").read_text()


def test_a_matrix_gives_off_domain_figures_and_selectivity(
    run_folder: Path, tmp_path: Path
) -> None:
    file = matrix_of(run_folder, tmp_path / "matrix.json", value=6.0, low=4.0, high=None)
    found = certify(run_folder, matrix=file).certificate
    assert [(o.name, o.measure) for o in found.off_domain] == [
        ("boolq-passages", "bits_per_byte"), ("sciq", "accuracy")
    ]  # fmt: skip
    prose, quiz = found.off_domain
    assert (prose.before.value, prose.after.value, prose.increase.value) == (1.0, 1.5, 0.35)
    assert (quiz.before.value, quiz.after.value, quiz.increase.value) == (0.8, 0.5, -0.3)
    s = found.selectivity
    assert s is not None
    assert (s.value, s.low, s.high, s.unbounded) == (6.0, 4.0, None, False)
    assert s.over == "off the domain, against domain"
    assert selectivity_text(s) == "6 [4, open]"
    assert "bench" in s.command
    assert "selectivity" not in found.not_measured
    text = (run_folder / "certificate.md").read_text()
    assert "boolq-passages" in text
    assert "6 [4, open]" in text


def test_no_loss_on_the_domain_is_told_apart(run_folder: Path, tmp_path: Path) -> None:
    file = matrix_of(run_folder, tmp_path / "matrix.json", value=None, on=-0.01)
    s = certify(run_folder, matrix=file).certificate.selectivity
    assert s is not None
    assert s.unbounded
    assert selectivity_text(s).startswith("unbounded")


def test_an_audit_gives_the_ratio_and_what_was_lost(run_folder: Path, tmp_path: Path) -> None:
    folder = audit_of(run_folder, tmp_path / "audit", tokens=None, scratch=200.0)
    found = certify(run_folder, relearn=[folder]).certificate
    (r,) = found.relearning
    assert (r.domain, r.ratio, r.at_least, r.at_most) == ("english", None, 2.0, None)
    assert relearning_text(r) == "above 2"
    assert (r.tokens, r.scratch_tokens, r.budget, r.seeds) == (None, 200.0, 400, 2)
    (o,) = found.off_domain
    assert o.increase.value == pytest.approx(2.0 * math.log(2))
    s = found.selectivity
    assert s is not None
    bits = [i.value for i in found.on_domain.bits_per_byte]
    assert s.on_increase == pytest.approx((bits[1] - bits[0]) * math.log(2))
    if s.on_increase > 0:
        assert s.value == pytest.approx(2.0 / (bits[1] - bits[0]))
    else:
        assert s.unbounded
    both = certify(run_folder, relearn=[folder], matrix=matrix_of(run_folder, tmp_path / "m.json"))
    assert both.certificate.selectivity.over == "off the domain, against domain"
    assert len(both.certificate.off_domain) == 3


def test_a_bench_gives_the_speed(run_folder: Path, tmp_path: Path) -> None:
    found = certify(run_folder, bench=bench_of(run_folder, tmp_path / "bench.json")).certificate
    assert found.speed is not None
    assert (found.speed.prefill.value, found.speed.decode.value) == (1.5, 1.3)
    assert "speed" not in found.not_measured
    whole = bench_of(run_folder, tmp_path / "other.json", first="0" * 64)
    with pytest.raises(BadInput, match="does not compare"):
        certify(run_folder, bench=whole)
    with pytest.raises(BadInput, match="no-speed"):
        certify(run_folder, bench=bench_of(run_folder, tmp_path / "slow.json", timed=False))


def test_a_recovered_run_is_held_against_the_whole_model(run_folder: Path, tmp_path: Path) -> None:
    """Its own rows are against the run that it went on with."""
    later = Path(shutil.copytree(run_folder, tmp_path / "later"))
    whole, narrow = (json.loads(x) for x in (run_folder / "rows.jsonl").read_text().splitlines())
    timed = {f"{n}_ratio{end}": 9.0 for n in ("prefill", "decode") for end in ("", "_low", "_high")}
    after = {**narrow, **timed, "bits_per_byte": 1.1 * whole["bits_per_byte"],
             "bits_per_byte_ratio": 0.5}  # fmt: skip
    rows = [{**narrow, "label": "before", "sha256": "f" * 64}, after]
    (later / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    told = json.loads((later / "manifest.json").read_text())
    told |= {"made_from": {"model": told["model"]}, "recover": {"tokens": 640},
             "model": {"name": str(run_folder), "sha256": "f" * 64}}  # fmt: skip
    (later / "manifest.json").write_text(json.dumps(told))
    found = certify(later).certificate
    assert found.on_domain.increase.value == pytest.approx(0.1)
    assert found.on_domain.increase.low is None
    assert found.speed is None  # that of its rows is against the run before it
    assert found.recovered_tokens == 640
    assert found.original.sha256 == whole["sha256"]
    benched = bench_of(run_folder, tmp_path / "bench.json")
    found = certify(later, bench=benched).certificate
    assert found.on_domain.increase.value == narrow["bits_per_byte_ratio"] - 1
    assert found.on_domain.command.startswith("llm-narrow bench")
    assert found.speed is not None
    shutil.rmtree(run_folder)
    with pytest.raises(BadInput, match=r"not against the whole model .*--bench"):
        certify(later)


def test_the_card_has_one_section_and_keeps_the_rest(run_folder: Path, tmp_path: Path) -> None:
    card = run_folder / "model/README.md"
    before = card.read_text()
    certify(run_folder)
    once = card.read_text()
    assert once.startswith(before.rstrip())
    certify(run_folder, relearn=[audit_of(run_folder, tmp_path / "audit")])
    twice = card.read_text()
    assert twice.count(BEGIN) == twice.count(END) == 1
    assert "relearning of english" in twice
    assert "relearning of english" not in once
    assert twice.startswith(before.rstrip())
    certify(run_folder)
    assert card.read_text() == once
    missing = tmp_path / "none.md"
    assert with_section(missing, "x") == f"{BEGIN}\nx\n{END}\n"


def test_the_report_shows_it(run_folder: Path, tmp_path: Path) -> None:
    certify(
        run_folder, matrix=matrix_of(run_folder, tmp_path / "matrix.json"),
        relearn=[audit_of(run_folder, tmp_path / "audit")], command="certify <run> & more",
    )  # fmt: skip
    written = page.write([run_folder], tmp_path / "out")
    text, md = (path.read_text(encoding="utf-8") for path in (written.html, written.md))
    section = text[text.index('<section id="certificate">') :].partition("</section>")[0]
    for told in ("selectivity", "What it is not for", "relearning of", "Not measured: speed"):
        assert told in section
    assert "certify &lt;run&gt; &amp; more" in section or "certify <run>" not in section
    assert md.count("## Certificate") == 1
    file = run_folder / "certificate.json"
    other = json.loads(file.read_text())
    other["model"]["sha256"] = "0" * 64
    file.write_text(json.dumps(other))
    again = page.write([run_folder], tmp_path / "again")
    assert any(w.startswith("The certificate is left out: ") for w in again.warnings)
    assert 'id="certificate"' not in again.html.read_text(encoding="utf-8")


def test_other_weights_are_refused(run_folder: Path, tmp_path: Path) -> None:
    certify(run_folder)
    assert certificate.load(run_folder) is not None
    weights = run_folder / "model/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(BadInput, match="certify it again"):
        certificate.load(run_folder)
    with pytest.raises(BadInput, match="not of this model"):
        certify(run_folder)


def test_files_of_other_models_are_refused(run_folder: Path, tmp_path: Path) -> None:
    other = matrix_of(run_folder, tmp_path / "other.json")
    other.write_text(other.read_text().replace('"form": 1', '"form": 2'))
    with pytest.raises(BadInput, match="form 2, and this version reads form 1"):
        certify(run_folder, matrix=other)
    matrix = matrix_of(run_folder, tmp_path / "matrix.json", own="0" * 64)
    with pytest.raises(BadInput, match=r"does not compare .*bench"):
        certify(run_folder, matrix=matrix)
    audit = audit_of(run_folder, tmp_path / "audit", own="0" * 64)
    with pytest.raises(BadInput, match=r"does not audit .*relearn"):
        certify(run_folder, relearn=[audit])
    assert not (run_folder / "certificate.json").exists()


@pytest.mark.parametrize("text", ["{}", "[]", '{"models": []}', "not json", '{"models": [{}]}'])
def test_files_that_are_something_else(run_folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "audit").mkdir()
    for file in (tmp_path / "x.json", tmp_path / "audit/relearn.json"):
        file.write_text(text)
    with pytest.raises(BadInput):
        certify(run_folder, matrix=tmp_path / "x.json")
    with pytest.raises(BadInput):
        certify(run_folder, relearn=[tmp_path / "audit"])
    with pytest.raises(BadInput):
        certify(run_folder, bench=tmp_path / "x.json")
    with pytest.raises(BadInput, match=r"There is no .*nowhere"):
        certify(run_folder, matrix=tmp_path / "nowhere.json")


def test_the_command_line(run: Any, run_folder: Path, tmp_path: Path) -> None:
    file = matrix_of(run_folder, tmp_path / "matrix.json")
    done = run("certify", run_folder, "--matrix", file, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["command"] == f"llm-narrow certify {run_folder} --matrix {file} " \
        "--json"  # fmt: skip
    assert "Not measured: speed" in run("certify", run_folder, "--matrix", file).out
    refused(run("certify", tmp_path), "is not a finished run folder")
