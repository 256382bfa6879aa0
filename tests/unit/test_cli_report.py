"""What a peer tells people and programs."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from p2pasr.errors import LocalError
from p2pasr.report import MAX_SAID, Report, error_rate_table, progress_bar


@pytest.fixture
def out() -> io.StringIO:
    """Where a report goes."""
    return io.StringIO()


def events(out: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_for_programs_an_event_is_one_json_object_on_one_line(out: io.StringIO) -> None:
    Report("json", out).emit("round", "round 3\nis 完成", round=3, state=b"\xab\xcd", peers=("a", "b"), path=Path("x"))

    (event,) = events(out)
    assert out.getvalue().count("\n") == 1
    assert "完成" in out.getvalue()
    assert isinstance(event.pop("time"), float)
    assert event == {
        "event": "round",
        "message": "round 3 is 完成",
        "round": 3,
        "state": "abcd",
        "peers": ["a", "b"],
        "path": "x",
    }


def test_sets_are_written_as_lists(out: io.StringIO) -> None:
    Report("json", out).emit("group", "two", peers=frozenset({"a"}))

    assert events(out)[0]["peers"] == ["a"]


def test_for_people_an_event_is_a_sentence_on_one_line_however_long(out: io.StringIO) -> None:
    sentence = f"round 3 [of 8] is done: {'peer ' * 60}[bold]not markup[/bold]"
    Report("text", out).emit("round", sentence, state=b"\xab")

    assert out.getvalue()[9:] == f"{sentence}\n"
    assert out.getvalue()[2] == out.getvalue()[5] == ":"


def test_the_same_sentence_is_not_said_again_at_once(out: io.StringIO) -> None:
    report = Report("json", out)
    for _ in range(3):
        report.wait("waiting for peers")
        report.warn("a peer is slow")
    report.wait("waiting for claims")
    report.wait("waiting for peers")

    assert [(event["event"], event["message"]) for event in events(out)] == [
        ("wait", "waiting for peers"),
        ("warning", "a peer is slow"),
        ("wait", "waiting for claims"),
    ]


def test_what_was_said_is_not_remembered_without_end(out: io.StringIO) -> None:
    report = Report("json", out)
    for number in range(2 * MAX_SAID):
        report.warn(f"peer {number} is slow")
        report.wait(f"waiting for peer {number}")
    assert len(report._said) == MAX_SAID


def test_several_threads_say_the_same_sentence_once(out: io.StringIO) -> None:
    report = Report("json", out)
    with ThreadPoolExecutor(8) as pool:
        for number in range(200):
            pool.submit(report.warn, f"peer {number % 50} is slow")
    assert len(events(out)) == 50


def test_the_live_line_is_not_written_to_files(out: io.StringIO) -> None:
    report = Report("text", out)
    report.progress("training", 1, 4)
    report.progress("training", 4, 4)
    report.close()

    assert out.getvalue() == ""


def test_the_live_line_shows_on_a_terminal_and_goes_away(out: io.StringIO) -> None:
    report = Report("text", out)
    report._console = Console(file=out, force_terminal=True, width=100)
    report.progress("round 2 segment 1/4", 1, 4)
    report.progress("round 2 segment 2/4", 4, 4)

    assert "round 2 segment" in out.getvalue()
    assert report._progress is None
    report.progress("round 3", 0, 4)
    report.close()
    assert "round 3" in out.getvalue()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (LocalError("the key is damaged"), "the key is damaged"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), "a.json: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("something"), "something"),
    ],
)
def test_a_failure_is_one_sentence_on_standard_error(
    out: io.StringIO, capsys: pytest.CaptureFixture[str], error: Exception, sentence: str
) -> None:
    Report("json", out).fail(error)

    assert capsys.readouterr().err == f"p2pasr: {sentence}\n"
    assert [(event["event"], event["message"]) for event in events(out)] == [("error", sentence)]


def test_for_people_a_failure_is_said_once(out: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    Report("text", out).fail(LocalError("the key is damaged"))

    captured = capsys.readouterr()
    assert (out.getvalue(), captured.out, captured.err) == ("", "", "p2pasr: the key is damaged\n")


def test_a_progress_bar_leaves_standard_output_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("counting") as on_progress:
        for done in range(5):
            on_progress(done, 4)

    assert capsys.readouterr().out == ""


def test_error_rates_are_a_table_of_percentages(out: io.StringIO) -> None:
    base = {"cer": 0.7461, "wer": None, "exact": 0.0, "clips": 389, "empty": 0, "invented": 0}
    trained = {"cer": 1.25, "wer": 0.05, "exact": 0.876, "clips": 389, "empty": 0, "invented": 0}

    Console(file=out, width=80).print(error_rate_table("Cantonese", {"base": base, "trained": trained}))

    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.getvalue().splitlines() if "│" in line]
    assert rows == [
        ["base", "74.6%", "–", "0.0%", "389", "0", "0"],
        ["trained", "125.0%", "5.0%", "87.6%", "389", "0", "0"],
    ]


def test_what_a_score_is_made_of_gets_a_table_of_its_own(out: io.StringIO) -> None:
    scores = {
        "accent": {
            "accuracy": 0.9375,
            "clips": 80,
            "confusion": {"cmn": {"cmn": 39, "yue": 1}, "yue": {"cmn": 4, "yue": 36}},
        },
        "masked": {"l1": 0.27363, "clips": 80},
    }
    Console(file=out, width=80).print(error_rate_table("Dialects", {"base": scores, "trained": scores}))

    shown = out.getvalue()
    titles = [line.strip() for line in shown.splitlines() if line.startswith("Dialects")]
    assert titles == [
        "Dialects: accent",
        "Dialects: accent: confusion, base",
        "Dialects: accent: confusion, trained",
        "Dialects: masked",
    ]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert rows[1] == ["trained", "93.8%", "80"]
    assert rows[2:4] == [["cmn", "39", "1"], ["yue", "4", "36"]]
    assert rows[-1] == ["trained", "0.274", "80"]
