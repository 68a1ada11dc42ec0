"""A run directory: who may write it, what it refuses, what it keeps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.builders import ROOT
from support.small_runs import CONFIG, make_metrics, write_run

from research.errors import InputError
from research.runs.directory import RunDirectory


def test_status_follows_the_files(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert run.status() == "absent"
    with run:
        assert run.claim(CONFIG) == "absent"
        assert run.status() == "unfinished"
    assert not (run.path / ".lock").exists()
    with run:
        assert run.claim(CONFIG) == "unfinished"
        run.write_metrics(make_metrics())
    assert run.claim(CONFIG) == "finished"


def test_second_writer_is_refused_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from research.runs.directory import RunDirectory; RunDirectory(sys.argv[1]).claim({'pipeline': 'kd_only'})"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with RunDirectory(tmp_path / "run") as run:
        run.claim({"pipeline": "kd_only"})
        refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert refused.returncode == 1 and "being written by another process" in refused.stderr
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_other_config_is_refused_with_its_flags(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"another config: --kd_alpha 0\.7 there, 0\.5 asked\. Use another"):
        RunDirectory(path).claim({**CONFIG, "kd_alpha": 0.5})


def test_a_flag_that_the_stored_version_did_not_have_is_at_its_default(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    assert RunDirectory(path).claim({**CONFIG, "threshold_rule": "best_f1", "teacher_tfidf": False}) == "finished"
    with pytest.raises(InputError, match="another config: --threshold_rule best_f1 there, shrunk asked"):
        RunDirectory(path).claim({**CONFIG, "threshold_rule": "shrunk"})


def test_only_unresolved_flags_may_stay_open(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with run:
        run.claim(CONFIG)
        run.write_config({**CONFIG, "label_columns": ["bully"], "teacher_checkpoint": "t"})
    with pytest.raises(InputError, match="another config: --teacher_checkpoint t there, unset asked"):
        run.claim(CONFIG, unresolved=("label_columns",))
    with pytest.raises(InputError, match="another config: --label_columns bully there, unset asked"):
        run.claim({**CONFIG, "teacher_checkpoint": "t"})
    with run:
        assert run.claim({**CONFIG, "teacher_checkpoint": "t"}, unresolved=("label_columns",)) == "unfinished"


def test_finished_run_is_refused_for_a_table_of_other_content(tmp_path: Path) -> None:
    run = RunDirectory(write_run(tmp_path / "run"))
    run.write_environment({"data": {"file_sha256": {"main": "a", "test": "b"}}})
    paths = {"main": Path("comments.csv"), "test": Path("test.csv")}
    run.check_tables({"main": "a", "test": "b"}, paths)
    with pytest.raises(InputError, match=r"was made from another content of test\.csv\. Use another --output_dir"):
        run.check_tables({"main": "a", "test": "c"}, paths)


def test_overwrite_keeps_foreign_files(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    write_run(path / "fold_1")
    (path / "plots").mkdir()
    foreign = [path / "notes.txt", path / "plots" / "mine.png", path / "fold_1" / "mine.txt"]
    for file in foreign:
        file.write_text("mine")
    with RunDirectory(path) as run:
        assert run.claim({**CONFIG, "kd_alpha": 0.5}, overwrite=True) == "absent"
        assert run.status() == "unfinished"
        assert all(file.read_text() == "mine" for file in foreign)
        left = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {".lock", ".overwriting"}
    assert left == {"config.json", "notes.txt", "plots/mine.png", "fold_1/mine.txt"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_folder_is_never_written(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="holds no run of this suite"):
        RunDirectory(tmp_path).claim(CONFIG, overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_unwritable_place_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        RunDirectory(tmp_path / "file" / "run").claim(CONFIG)


def test_overwriting_that_was_interrupted_goes_on_with_the_same_command(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    run = RunDirectory(path)
    with run:
        assert run.claim(CONFIG, overwrite=True) == "absent"
    (path / "history.csv").touch()
    with run:
        assert run.claim(CONFIG, overwrite=True) == "unfinished"
    assert (path / "history.csv").exists()
    other = {**CONFIG, "kd_alpha": 0.5}
    with run:
        assert run.claim(other, overwrite=True) == "absent", "other flags start afresh"
        assert not (path / "history.csv").exists()
    with run:
        assert run.claim(other, overwrite=True) == "unfinished"
        run.write_metrics(make_metrics())
    assert not (path / ".overwriting").exists()
    with run:
        assert run.claim(other, overwrite=True) == "absent", "a finished run is overwritten"


def test_beginning_of_a_run_without_overwrite_is_overwritten_once(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with run:
        run.claim(CONFIG)
    with run:
        assert run.claim(CONFIG, overwrite=True) == "absent"
    with run:
        assert run.claim(CONFIG, overwrite=True) == "unfinished"


def test_preview_refuses_what_the_claim_would_and_takes_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert run.preview(CONFIG) == "absent"
    assert not run.path.exists()
    write_run(run.path)
    assert run.preview(CONFIG) == "finished"
    with pytest.raises(InputError, match="another config"):
        run.preview({**CONFIG, "kd_alpha": 0.5})


def test_claim_of_a_killed_process_in_a_finished_run_goes_with_its_other_leavings(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    code = "import sys, os; from pathlib import Path; from research.storage.claims import Claim; "
    killed = code + "Claim(Path(sys.argv[1])).acquire(); os._exit(9)"
    subprocess.run([sys.executable, "-c", killed, str(path / ".lock")], cwd=ROOT, check=False)
    assert (path / ".lock").exists()
    RunDirectory(path).drop_leavings()
    assert not list(path.glob(".lock*"))
