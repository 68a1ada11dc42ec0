"""A table is labelled as the model labels each text by itself, through kills, changed tables and every format."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.builders import LABELS, ROOT, make_table, make_texts
from support.shipping import counting_scorer, read_table, write_texts

import research_predict
from research.errors import InputError
from research.models.saved import load_classifier
from research.shipping import predict
from research.shipping.scorers import compute_logits, open_scorer


def classify_alone(folder: Path, text: str) -> np.ndarray:
    """Return a text's probabilities as the README's lines compute them."""
    saved = load_classifier(str(folder))
    batch = saved.tokenizer([text], truncation=True, max_length=saved.settings["max_length"], return_tensors="pt")
    with torch.inference_mode():
        logits = saved.model.eval()(batch["input_ids"], batch["attention_mask"])["logits"][0]
    return 1 / (1 + np.exp(-logits.double().numpy()))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "CHUNK_ROWS", 8)


def test_every_row_gains_the_probabilities_and_decisions_of_its_text(student: Path, tmp_path: Path) -> None:
    texts = make_texts(12, seed=3)
    table = write_texts(tmp_path / "in.csv", texts, id=range(12))
    assert (
        research_predict.main(["--model", str(student), "--dataset_path", str(table), "--output_path", str(tmp_path / "out.csv")])
        == 0
    )
    rows = read_table(tmp_path / "out.csv")
    assert list(rows[0]) == ["text", "id", *(f"p_{label}" for label in LABELS), *LABELS]
    thresholds = load_classifier(str(student)).settings["thresholds"]
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        assert (row["text"], row["id"]) == (text, str(number))
        expected = classify_alone(student, text)
        np.testing.assert_allclose([float(row[f"p_{label}"]) for label in LABELS], expected, atol=1e-5)
        assert [row[label] for label in LABELS] == [str(int(float(row[f"p_{label}"]) >= thresholds[label])) for label in LABELS]
    assert {row[label] for row in rows for label in LABELS} == {"0", "1"}


def test_the_model_brings_its_normalisation_and_length(student: Path, tmp_path: Path) -> None:
    composed, long = "ভিডিও\u09df", " ".join(["আজ"] * 40)
    table = write_texts(tmp_path / "in.csv", ["ভিডিও\u09af\u09bc", f"  {composed}", long, " ".join(["আজ"] * 30)])
    scorer = open_scorer(str(student))
    predict.predict_table(scorer, str(table), str(tmp_path / "out.csv"))
    rows = read_table(tmp_path / "out.csv")
    for one, other in ((0, 1), (2, 3)):
        assert [rows[one][f"p_{label}"] for label in LABELS] == [rows[other][f"p_{label}"] for label in LABELS]


def test_a_text_is_given_the_same_bits_in_any_company(student: Path) -> None:
    scorer = open_scorer(str(student))
    texts = make_texts(150, seed=9)
    logits = compute_logits(scorer, texts)
    order = random.Random(0).sample(range(150), 150)
    assert np.array_equal(compute_logits(scorer, [texts[row] for row in order]), logits[order])
    for row in (0, 71, 149):
        assert np.array_equal(compute_logits(scorer, [texts[row]])[0], logits[row])


def test_calls_of_one_width_have_one_shape() -> None:
    shapes: set[tuple[int, int]] = set()
    scorer = counting_scorer([])

    def classify(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        shapes.add(ids.shape)
        assert ids.shape == mask.shape
        return scorer.classify(ids, mask)

    watched = replace(scorer, classify=classify, call_tokens=40, max_length=13)
    compute_logits(watched, ["ab", "abc" * 4, "x" * 8, "y" * 13] * 7 + ["z" * 9])
    assert shapes == {(5, 8), (3, 13)}


def test_an_empty_text_has_no_answer_and_is_counted(student: Path, tmp_path: Path) -> None:
    table = write_texts(tmp_path / "in.csv", ["আজ", "", "  \n ", "খুব"])
    summary = predict.predict_table(open_scorer(str(student)), str(table), str(tmp_path / "out.csv"))
    rows = read_table(tmp_path / "out.csv")
    assert (summary.num_rows, summary.num_empty) == (4, 2)
    assert "2 of them empty" in str(summary)
    assert {row[name] for row in rows[1:3] for name in row if name != "text"} == {""}
    assert "" not in {cell for row in (rows[0], rows[3]) for cell in row.values()}


def test_a_column_of_that_name_is_not_written_over(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = make_table(tmp_path / "in.csv", rows=5)
    flags = ["--model", str(student), "--dataset_path", str(table), "--output_path", str(tmp_path / "out.csv")]
    assert research_predict.main(flags) == 2
    assert "has a column 'bully' already" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()
    assert research_predict.main([*flags, "--prefix", "pred_"]) == 0
    rows, before = read_table(tmp_path / "out.csv"), read_table(table)
    assert [{name: row[name] for name in before[0]} for row in rows] == before
    assert set(rows[0]) - set(before[0]) == {f"pred_{kind}{label}" for kind in ("p_", "") for label in LABELS}


@pytest.mark.parametrize("fail_after", [1, 8, 9, 20])
@pytest.mark.usefixtures("small_chunks")
def test_a_stopped_command_goes_on_where_it_was(tmp_path: Path, fail_after: int) -> None:
    table = write_texts(tmp_path / "in.csv", [*make_texts(30), "", "end"])
    whole, calls, again = tmp_path / "whole.csv", list[int](), list[int]()
    predict.predict_table(counting_scorer(calls), str(table), str(whole))
    with pytest.raises(KeyboardInterrupt):
        predict.predict_table(counting_scorer([], fail_after), str(table), str(tmp_path / "out.csv"))
    assert not (tmp_path / "out.csv").exists()
    predict.predict_table(counting_scorer(again), str(table), str(tmp_path / "out.csv"))
    assert (tmp_path / "out.csv").read_bytes() == whole.read_bytes()
    assert sum(again) <= sum(calls) - 8 * (fail_after // 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.csv", "whole.csv"]


KILLED = textwrap.dedent("""
    import os, signal, sys
    from dataclasses import replace
    from support.shipping import counting_scorer
    from research.shipping import predict
    predict.CHUNK_ROWS = 8
    calls = []
    scorer = counting_scorer(calls)
    ask = scorer.classify
    def classify(ids, mask):
        if sum(calls) >= 17:
            os.kill(os.getpid(), signal.SIGKILL)
        return ask(ids, mask)
    predict.predict_table(replace(scorer, classify=classify), sys.argv[1], sys.argv[2])
""")


@pytest.mark.usefixtures("small_chunks")
def test_a_killed_command_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    table = write_texts(tmp_path / "in.csv", make_texts(40))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    out = tmp_path / "out.csv"
    done = subprocess.run([sys.executable, "-c", KILLED, str(table), str(out)], env=environment, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    calls: list[int] = []
    predict.predict_table(counting_scorer(calls), str(table), str(out))
    assert sum(calls) == 24  # two chunks of eight were kept
    predict.predict_table(counting_scorer([]), str(table), str(tmp_path / "whole.csv"))
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def interrupt(table: Path, out: Path) -> Path:
    """Stop a command after 16 of its rows; return the file of its answers."""
    with pytest.raises(KeyboardInterrupt):
        predict.predict_table(counting_scorer([], 16), str(table), str(out))
    return out.with_name(f".{out.name}.answers.tmp")


@pytest.mark.usefixtures("small_chunks")
def test_a_changed_table_keeps_no_answer_of_another_text(tmp_path: Path) -> None:
    texts, out, calls = make_texts(30), tmp_path / "out.csv", list[int]()
    interrupt(write_texts(tmp_path / "in.csv", texts), out)
    table = write_texts(tmp_path / "in.csv", [*texts[:5], "another", *texts[6:]])
    predict.predict_table(counting_scorer(calls), str(table), str(out))
    predict.predict_table(counting_scorer([]), str(table), str(tmp_path / "whole.csv"))
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert sum(calls) == 25


@pytest.mark.usefixtures("small_chunks")
def test_a_damaged_answer_is_made_again(tmp_path: Path) -> None:
    table, out, calls = write_texts(tmp_path / "in.csv", make_texts(30)), tmp_path / "out.csv", list[int]()
    answers = interrupt(table, out)
    content = bytearray(answers.read_bytes())
    content[-3] ^= 1
    answers.write_bytes(content)
    predict.predict_table(counting_scorer(calls), str(table), str(out))
    predict.predict_table(counting_scorer([]), str(table), str(tmp_path / "whole.csv"))
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert sum(calls) == 15


@pytest.mark.usefixtures("small_chunks")
def test_answers_of_another_model_are_not_taken_over(tmp_path: Path) -> None:
    table, out, calls = write_texts(tmp_path / "in.csv", make_texts(30)), tmp_path / "out.csv", list[int]()
    interrupt(table, out)
    predict.predict_table(replace(counting_scorer(calls), identity={"name": "other"}), str(table), str(out))
    assert sum(calls) == 30


def test_a_table_that_changes_while_it_is_read_is_told_of(tmp_path: Path) -> None:
    table, scorer = write_texts(tmp_path / "in.csv", make_texts(10)), counting_scorer([])

    def classify(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        write_texts(table, make_texts(10, seed=1))
        return scorer.classify(ids, mask)

    with pytest.raises(InputError, match="changed while it was read"):
        predict.predict_table(replace(scorer, classify=classify), str(table), str(tmp_path / "out.csv"))
    assert not (tmp_path / "out.csv").exists()


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    table, scorer = write_texts(tmp_path / "in.csv", make_texts(3)), counting_scorer([])
    with (
        predict.open_answers(tmp_path / ".out.csv.answers.tmp", scorer),
        pytest.raises(InputError, match="written by another process"),
    ):
        predict.predict_table(scorer, str(table), str(tmp_path / "out.csv"))


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl", ".parquet"])
def test_every_format_holds_the_same_answers(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    texts = ["a\tb", 'say "x"', "দুই\nলাইন", ""]
    table = write_texts(tmp_path / "in.csv", texts, id=range(4))
    predict.predict_table(counting_scorer([]), str(table), str(tmp_path / "out.csv"))
    predict.predict_table(counting_scorer([]), str(table), str(tmp_path / f"out{suffix}"))
    expected, found = read_table(tmp_path / "out.csv"), read_table(tmp_path / f"out{suffix}")
    assert [row["text"] for row in found] == texts
    for name in ("p_a", "p_b", "a", "b"):
        values = [None if row[name] in ("", None) else float(row[name]) for row in found]
        assert values == [None if row[name] == "" else float(row[name]) for row in expected]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_table_comes_back_with_the_delimiter_it_was_read_with(
    tmp_path: Path, delimiter: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in.csv").write_text(
        f'text{delimiter}id\n"a{delimiter} b"{delimiter}1\nc, d{delimiter}2\n'.replace("c, d", '"c, d"')
    )
    with caplog.at_level("INFO"):
        predict.predict_table(counting_scorer([]), str(tmp_path / "in.csv"), str(tmp_path / "out.csv"))
    header, *lines = (tmp_path / "out.csv").read_text().splitlines()
    assert header == delimiter.join(["text", "id", "p_a", "p_b", "a", "b"])
    assert [row["text"] for row in read_table(tmp_path / "out.csv")] == [f"a{delimiter} b", "c, d"] and len(lines) == 2
    assert ("cells are separated by" in caplog.text) == (delimiter != ",")


def test_json_keeps_its_values_and_what_utf8_cannot_hold(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "x", "n": 3, "tags": ["a"]}, {"text": "half \ud83d", "more": None}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    predict.predict_table(counting_scorer([]), str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in before} for row, before in zip(found, rows, strict=True)] == rows
    predict.predict_table(counting_scorer([]), str(tmp_path / "in.jsonl"), str(tmp_path / "out.csv"))
    assert [row["tags"] for row in read_table(tmp_path / "out.csv")] == ['["a"]', ""]


def test_parquet_keeps_the_types_of_its_columns(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    source = arrow.table({"text": ["a", None], "n": arrow.array([1, None], arrow.int32())})
    parquet.write_table(source, tmp_path / "in.parquet")
    predict.predict_table(counting_scorer([]), str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet"))
    found = parquet.read_table(tmp_path / "out.parquet")
    assert found.select(["text", "n"]) == source
    assert found["p_a"].null_count == found["a"].null_count == 1


def test_standard_input_and_output_stand_for_files(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    table = write_texts(tmp_path / "in.csv", make_texts(5))
    flags = ["--model", str(student), "--dataset_path"]
    assert research_predict.main([*flags, str(table), "--output_path", str(tmp_path / "out.csv")]) == 0
    capfdbinary.readouterr()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(table.read_bytes())))
    assert research_predict.main([*flags, "-", "--output_path", "-"]) == 0
    assert capfdbinary.readouterr().out == (tmp_path / "out.csv").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--dataset_path": "missing.csv"}, "no such file"),
        ({"--output_path": "out.txt"}, "must end in one of"),
        ({"--output_path": "there.csv"}, "is there already"),
        ({"--output_path": "in.csv"}, "is the table that is read"),
        ({"--output_path": "nowhere/out.csv"}, "there is no folder"),
        ({"--text_column": "body"}, "no column 'body'"),
        ({"--model": "nothing/here"}, "nothing/here"),
        ({"--model": "run"}, "is a run. Give a model of it"),
        ({"--int8": None}, "was not exported"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str | None],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "in.csv", make_texts(3))
    (tmp_path / "there.csv").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"pipeline": "kd_only"}')
    before = sorted(tmp_path.iterdir())
    flags = {"--model": str(student), "--dataset_path": "in.csv", "--output_path": "out.csv"} | change
    assert research_predict.main([word for pair in flags.items() for word in pair if word is not None]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_told_and_gone_on_from(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_texts(tmp_path / "in.csv", make_texts(5))
    flags = ["--model", str(student), "--dataset_path", str(table), "--output_path", str(tmp_path / "out.csv")]
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert research_predict.main(flags) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()
    assert research_predict.main(flags) == 0
