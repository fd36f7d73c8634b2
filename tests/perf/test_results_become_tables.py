"""The table says what results say: measured, counted or predicted, and never a toy for the real thing."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import measure
import pytest
import table

GPU = {"device": "NVIDIA H200", "driver": "580.1", "processors": 132, "commit": "abc1234"}


def stage(precision: str, step_ms: float, **more: Any) -> dict[str, Any]:
    row = {
        "precision": precision,
        "way": "graph",
        "layers": 40,
        "step_ms": step_ms,
        "share_%": 80.0,
        "of_cost": 1.004,
        "replay_equals_eager": True,
    }
    result = {
        "bench": "stage",
        "card": GPU,
        "size": "384x704",
        "window": 4,
        "tiny": False,
        "attention": [{"backend": "sdpa-cudnn", "tflops": 610.0}, {"backend": "triton", "tflops": 500.0}],
        "rows": [row],
    }
    return result | more


def line(made: str, start: str) -> str:
    return next(text for text in made.splitlines() if text.startswith(f"| {start}"))


def test_without_a_result_a_row_is_predicted_and_says_so() -> None:
    row = line(table.table([]), "14B step, 704x384, bfloat16")
    assert "predicted: H200" in row
    assert "| open |" in row


def test_a_goal_below_the_floor_is_not_called_open() -> None:
    """What no kernel could reach on the assumed machine is refused, not left open."""
    find = table._predicted_step(100, eight_bits=False)
    assert find().met is False


def test_a_prediction_lies_above_its_floor() -> None:
    for eight_bits in (False, True):
        expected_ms, floor_ms = table.predicted_step_ms(eight_bits=eight_bits)
        assert floor_ms < expected_ms < 1.5 * floor_ms


def test_a_measured_row_names_its_machine() -> None:
    made = table.table([stage("bf16", 181.0)])
    row = line(made, "14B step, 704x384, bfloat16")
    assert "181 ms" in row
    assert "measured: NVIDIA H200, abc1234" in row
    assert "| yes |" in row
    assert "610 TFLOP/s (sdpa-cudnn) | yes" in line(made, "best attention")
    assert "0.82x (500 TFLOP/s) | yes" in line(made, "our Triton attention")
    assert "1.004x | yes" in line(made, "memory of a rank")
    assert "equal | yes" in line(made, "replayed graph")


@pytest.mark.parametrize(
    ("settings", "says", "met"),
    [
        ({"nice": -10}, "17 ms, 27 ms at nice -10 (80 calls)", None),
        ({"priority": "nice 0 of nice -16"}, "17 ms, 27 ms at nice -16 (80 calls)", None),
        ({"priority": "nice 0 of nice 0"}, "17 ms, 27 ms (80 calls)", True),
        ({"nice": 5}, "17 ms, 27 ms (80 calls)", True),
    ],
)
def test_a_latency_at_a_raised_priority_says_so_and_meets_no_goal(
    settings: dict[str, Any], says: str, met: bool | None
) -> None:
    voice = {"ms": {"median": 17.0, "p95": 27.0, "count": 80}}
    lips = {"loudness_to_lips_lag_frames": 1, "loudness_to_lips_r": 0.5}
    result = {"bench": "avatar", "card": {"device": "CPU"}, "size": 256, "cores": 2, "load": 1.0, "voice": voice}
    result |= {"lips": lips, **settings}
    rows = {row.what: row for row in table.ROWS}
    found = rows["avatar: text to first voice, 12-100 characters: median, p95"].measured([result])
    assert found is not None
    assert (found.text, found.met) == (says, met)
    steady = rows["avatar: sound to lips"].measured([result])
    assert steady is not None
    assert steady.met is True, "what is not timed does not depend on it"


def test_a_missed_goal_is_a_no() -> None:
    assert "| no |" in line(table.table([stage("fp8", 150.0)]), "14B step, 704x384, FP8")


@pytest.mark.parametrize(
    "toy",
    [
        stage("bf16", 1.0, tiny=True),
        stage("bf16", 1.0, window=2),
        stage("bf16", 1.0, size="128x128"),
        stage("bf16", 1.0, card={"device": "AMD EPYC", "threads": 1}),
        stage("bf16", 1.0, rows=[]),
    ],
)
def test_a_toy_never_counts(toy: dict[str, Any]) -> None:
    assert "predicted" in line(table.table([toy]), "14B step, 704x384, bfloat16")


def test_an_extrapolated_step_says_so() -> None:
    result = stage("bf16", 185.0)
    result["rows"][0]["extrapolated_from"] = [4, 8]
    assert "extrapolated from [4, 8] layers" in line(table.table([result]), "14B step, 704x384, bfloat16")


def test_the_newest_result_wins(tmp_path: Path) -> None:
    for name, date, step_ms in (("a", "2026-02-01", 170.0), ("b", "2026-01-01", 180.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps(stage("bf16", step_ms) | {"date": date}))
    assert "170 ms" in line(table.table(table.load(tmp_path)), "14B step, 704x384, bfloat16")


def test_the_table_goes_between_its_markers_and_nowhere_else() -> None:
    begin, end = table.markers("results")
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    once = table.with_table(text, "results", "new")
    assert once == f"before\n{begin}\nnew\n{end}\nafter\n"
    assert table.with_table(once, "results", "new") == once
    for broken in ("no markers", f"{end} {begin}", f"{begin}{begin}{end}"):
        with pytest.raises(SystemExit, match="needs one"):
            table.with_tables(broken, [])


def test_ten_numbers_are_headlines_and_none_of_them_is_a_prediction() -> None:
    rows = table.headlines(table.load(table.RESULTS)).splitlines()[2:]
    assert len(rows) == 10
    assert [row for row in rows if "not measured" in row] == []
    assert "not measured" in line(table.headlines([]), "a denoising step")


def run_table(monkeypatch: pytest.MonkeyPatch, *arguments: str, said: str = "") -> str:
    """Call the command; its complaint, or nothing."""
    monkeypatch.setattr(sys, "argv", ["table.py", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    try:
        table.main()
    except SystemExit as error:
        return str(error.code)
    return ""


def test_a_stale_table_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "README.md"
    document.write_text("# title\n" + "\n".join(table.markers("headlines")) + "\n")
    (tmp_path / "results").mkdir()
    options = ("--results", str(tmp_path / "results"))
    assert "is stale" in run_table(monkeypatch, *options, "--check", str(document))
    assert run_table(monkeypatch, *options, "--write", str(document)) == ""
    assert run_table(monkeypatch, *options, "--check", str(document)) == ""
    assert "# title" in document.read_text()


def test_documents_show_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_table(monkeypatch, "--check") == ""


def test_a_kept_result_has_a_card_a_date_and_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = 'a table\n{"bench": "reference", "threads": 2, "rows": []}\na library says goodbye\n'
    monkeypatch.setattr(measure, "_run", lambda *_: "")  # no repository here
    options = ("--keep", "reference", "--results", str(tmp_path), "--commit", "abc")
    assert run_table(monkeypatch, *options, said=said) == ""
    assert capsys.readouterr().out == said
    kept = json.loads((tmp_path / "reference.json").read_text())
    assert kept["card"]["threads"] == 2
    assert kept["card"]["torch"]
    assert kept["card"]["commit"] == "abc"
    assert re.match(r"\d{4}-\d\d-\d\dT", kept["date"])


def test_what_was_measured_on_changed_files_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_run", lambda *_: "abc-dirty")
    said = '{"bench": "reference", "threads": 1, "rows": []}\n'
    complaint = run_table(monkeypatch, "--keep", "reference", "--results", str(tmp_path), said=said)
    assert "commit, and measure again" in complaint
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_result_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complaint = run_table(monkeypatch, "--keep", "x", "--results", str(tmp_path), said="Traceback ...\n")
    assert "no line is a bench's JSON object" in complaint
    assert list(tmp_path.iterdir()) == []
