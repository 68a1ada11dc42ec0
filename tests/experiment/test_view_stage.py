"""Views in whole runs: what they are made of, who learns what from them, and that runs repeat and go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.tiny_lab import QUICK, TinyLab, build_materials, read_metrics, read_table, repeated_bytes, write_table

from research.errors import StopRequest
from research.experiment.dataset import load_dataset
from research.experiment.inputs import load_inputs
from research.experiment.runtime import Extras, Runtime, start_runtime
from research.experiment.seen_texts import read_seen
from research.experiment.view_stage import add_views, label_views, rows_in_turn, training_rows
from research.kd.loop import EpochLoop
from research.text.near_duplicates import NearDuplicates, reduce_to_letters
from research_config import parse_arguments

VIEWS = "--augment 2 --epochs 3"
KINDS = ("noise", "dropout", "swap", "fill")


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Materials whose teacher has its masked-language head."""
    folder = build_materials(tmp_path_factory.mktemp("materials"))
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder / "models" / "teacher")
    model: Any = transformers.AutoModelForMaskedLM.from_config(config)
    model.base_model.load_state_dict(transformers.AutoModel.from_pretrained(folder / "models" / "teacher").state_dict())
    model.save_pretrained(folder / "models" / "masked")
    transformers.AutoTokenizer.from_pretrained(folder / "models" / "teacher").save_pretrained(folder / "models" / "masked")
    return folder


def prepare(flags: str = VIEWS) -> tuple[Any, Runtime]:
    """Return the inputs of a run with its views, and where it computes."""
    config = parse_arguments([*QUICK.split(), "--dataset_path", "data/comments.csv", *flags.split()]).config
    runtime = start_runtime(config, [], StopRequest(), Extras())
    return add_views(load_inputs(load_dataset(config)), runtime), runtime


def texts_of(inputs: Any) -> list[list[str]]:
    """Return the views of each training text."""
    return [list(inputs.comments.iter_texts_of(rows)) for rows in inputs.views.rows]


def test_views_are_changed_training_texts_and_no_other_row_has_any(lab: TinyLab) -> None:
    inputs, _ = prepare()
    train = list(inputs.comments.iter_texts_of(inputs.split.train))
    views = texts_of(inputs)
    assert inputs.views.rows.shape == inputs.views.sources.shape == (len(train), 2)
    assert inputs.views.sources[:, 0].tolist() == inputs.split.train.tolist()
    changed = [view != text for text, of_text in zip(train, views, strict=True) for view in of_text]
    assert np.mean(changed) > 0.9
    # A row's own number stands in each text, and only a swap brings another one's.
    known = {text.split()[-1] for text in train}
    numbers = {word for of_text in views for view in of_text for word in view.split() if word.isdigit()}
    assert numbers <= known
    assert np.isnan(inputs.comments.labels[inputs.views.rows.reshape(-1)]).all()
    assert list(inputs.comments.file_sha256) == ["main"]


def test_the_same_seed_gives_the_same_views_however_many_there_are(lab: TinyLab) -> None:
    two, three, other = (prepare(flags)[0] for flags in (VIEWS, "--augment 3 --epochs 4", f"{VIEWS} --split_seed 1"))
    assert [views[:2] for views in texts_of(three)] == texts_of(two)
    again = prepare(f"{VIEWS} --cache_dir again --seed 7 --kd_alpha 0.1")[0]
    assert texts_of(again) == texts_of(two)
    known = {row: views for row, views in zip(two.split.train.tolist(), texts_of(two), strict=True)}
    moved = {row: views for row, views in zip(other.split.train.tolist(), texts_of(other), strict=True)}
    assert any(known[row] != moved[row] for row in known.keys() & moved.keys())
    assert len(lab.entries("views")) == 3


def test_swapped_words_come_from_a_text_of_the_same_labels(lab: TinyLab) -> None:
    inputs, _ = prepare(f"{VIEWS} --augment_kinds swap")
    train = list(inputs.comments.iter_texts_of(inputs.split.train))
    labels = inputs.comments.labels[inputs.split.train]
    word_sets = [set(text.split()) for text in train]
    swapped = 0
    for place, views in enumerate(texts_of(inputs)):
        for view in views:
            new = set(view.split()) - word_sets[place]
            if view != train[place]:
                swapped += 1
                alike = [words for words, cells in zip(word_sets, labels, strict=True) if (cells == labels[place]).all()]
                assert any(new <= words for words in alike)
    assert swapped > 30


def test_no_view_is_near_a_held_out_text_and_the_text_itself_stands_for_it(lab: TinyLab) -> None:
    plain, _ = prepare()
    train = list(plain.comments.iter_texts_of(plain.split.train))
    letters = [reduce_to_letters(text) for text in train]
    # Tables of their own, which hold what the views would be, and one training text but for its number.
    some = [views[0] for views in texts_of(plain)][:20]
    label = ["0"] * 5
    header = read_table(Path("data/comments.csv"))[0]
    held = [[f"{text} !", *label] for text in dict.fromkeys(some) if reduce_to_letters(text) not in letters]
    write_table(Path("held.csv"), [list(header), *held, [f"{train[0]} 1", *label]])
    inputs, _ = prepare(f"{VIEWS} --cache_dir other --test_path held.csv")
    near = NearDuplicates(inputs.comments.iter_texts_of(np.concatenate([inputs.split.test, inputs.split.validation])))
    kept = 0
    for text, views in zip(inputs.comments.iter_texts_of(inputs.split.train), texts_of(inputs), strict=True):
        for view in views:
            assert view == text or not near.find([view])[0]
            kept += view != text
    facts = json.loads(next(Path("other/views").glob("*/facts.json")).read_text())
    assert facts["near_duplicates"] > 10
    assert sum(facts["views"].values()) == kept


def test_words_are_filled_in_by_the_head_of_the_teachers_encoder(lab: TinyLab) -> None:
    run_dir = lab.done("masked", f"{VIEWS} --teacher_path models/masked --augment_kinds fill")
    facts = json.loads(next(Path("cache/views").glob("*/facts.json")).read_text())
    assert facts["views"]["fill"] > 50 and "fill" in (run_dir / "run.log").read_text(encoding="utf-8")
    other = lab.done("plain", f"{VIEWS} --teacher_path models/masked --augment_kinds noise fill")
    assert read_metrics(other) != read_metrics(run_dir)


def test_without_such_a_head_one_line_says_so_and_fill_alone_is_refused(lab: TinyLab) -> None:
    log = (lab.done("run", VIEWS) / "run.log").read_text(encoding="utf-8")
    assert log.count("no words are filled in, since there is no masked-language head, or no mask token, in models/teacher") == 1
    assert "views are made by noise, dropout, swap" in log
    assert lab.refused(f"{VIEWS} --augment_kinds fill").startswith("error: --augment_kinds: fill needs an encoder that can fill")


def test_an_epoch_reads_the_texts_and_the_next_their_views_by_turns(lab: TinyLab, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[list[int]]] = {}
    unknown: dict[str, list[float]] = {}
    train = EpochLoop._train_epoch

    def record(loop: EpochLoop, steps: Any) -> None:
        batches = list(loop.loader.iterate(loop.progress.epoch))
        seen.setdefault(loop.name, []).append(sorted(row for batch in batches for row in batch["row"].tolist()))
        cells = torch.cat([batch["labels"] for batch in batches])
        unknown.setdefault(loop.name, []).append(float(cells.isnan().float().mean()))
        train(loop, steps)

    monkeypatch.setattr(EpochLoop, "_train_epoch", record)
    write_table(Path("more.csv"), [["text"], ["একদম নতুন লেখা"], ["আরও একটি নতুন মন্তব্য"]])
    run_dir = lab.done("run", "--augment 2 --epochs 5 --early_stopping_patience 9 --with_control --unlabelled_path more.csv")
    inputs, _ = prepare("--augment 2 --epochs 5 --unlabelled_path more.csv")
    texts, unlabelled = inputs.split.train.tolist(), inputs.split.unlabelled.tolist()
    views = [inputs.views.rows[:, 0].tolist(), inputs.views.rows[:, 1].tolist()]
    of_epochs = [texts, *views, texts, views[0]]
    assert seen["control"] == of_epochs
    assert seen["student"] == [sorted(rows + unlabelled) for rows in of_epochs]
    assert seen["teacher"] == [texts]
    # The control knows the labels of its views, the student those of the texts alone.
    assert unknown["control"] == [0.0] * 5
    assert unknown["student"] == pytest.approx([2 / (len(texts) + 2), 1, 1, 2 / (len(texts) + 2), 1])
    seen.clear()
    flags = "--augment 2 --epochs 5 --early_stopping_patience 9 --unlabelled_path more.csv --pipeline student_only"
    alone = lab.done("alone", flags)
    assert seen["student"] == of_epochs
    assert (alone / "history.csv").read_bytes() == (run_dir / "history_control.csv").read_bytes()
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["dataset"]["views"] == 2 * len(texts) and environment["dataset"]["rows"] == 82


def test_labels_of_a_view_are_those_of_its_text(lab: TinyLab) -> None:
    inputs, _ = prepare()
    labels = label_views(inputs, inputs.comments.labels)
    for row, views in zip(inputs.split.train, inputs.views.rows, strict=True):
        assert (labels[views] == inputs.comments.labels[row]).all()
    rows, turns = rows_in_turn(inputs, inputs.split.train)
    assert turns is not None
    for turn in turns:
        assert (labels[rows[turn]] == inputs.comments.labels[inputs.split.train]).all()


def test_the_teacher_is_that_of_a_run_without_views_and_scores_every_view(lab: TinyLab) -> None:
    plain, augmented = lab.done("plain", "--epochs 3"), lab.done("augmented", VIEWS)
    assert len(lab.entries("teachers")) == 1
    for name in ("model.safetensors", "config.json"):
        assert (plain / "teacher" / name).read_bytes() == (augmented / "teacher" / name).read_bytes()
    assert read_metrics(plain)["teacher"] == read_metrics(augmented)["teacher"]
    assert (plain / "history.csv").read_bytes() != (augmented / "history.csv").read_bytes()
    sizes = sorted(len(np.load(path)) for path in Path("cache/logits").glob("*/logits.npy"))
    assert sizes[-1] == 3 * sizes[-2] == 3 * 64
    seen = read_seen(augmented / "student")
    inputs, _ = prepare()
    assert seen is not None and set(inputs.comments.text_hash[training_rows(inputs)[0]].tolist()) == set(seen.tolist())


@pytest.mark.parametrize(
    "flags",
    [
        "--with_control --batch 7",
        "--kd_method multi_level --layer_mapping 1:1,3:2 --trim_student_vocab 1",
        "--kd_method hidden --layer_mapping 1:1,3:2 --cache_budget_gb 0",
        "--teacher_seeds 2 --rank_loss_weight 0.5 --anneal_labels --undo_class_weights --ema_decay 0.5",
        "--pipeline student_only --student_kind static",
    ],
)
def test_a_run_repeats_and_goes_on_after_a_kill_to_the_same_bytes(
    flags: str, lab: TinyLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = f"{VIEWS} {flags}"
    whole = repeated_bytes(lab.done("whole", flags))
    finish = EpochLoop._finish_epoch

    def kill(loop: EpochLoop, started: float) -> None:
        finish(loop, started)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EpochLoop, "_finish_epoch", kill)
        assert lab.run(f"{flags} --cache_dir other --output_dir results/killed")[0] == 130
    assert repeated_bytes(lab.done("killed", f"{flags} --cache_dir other")) == whole


def test_folds_and_sweeps_make_views_of_each_runs_own_training_texts(lab: TinyLab) -> None:
    folds = lab.done("folds", f"{VIEWS} --num_folds 2")
    assert read_metrics(folds)["folds"]
    assert len(lab.entries("views")) == 2
    for path in Path("cache/views").glob("*/facts.json"):
        facts = json.loads(path.read_text())
        sizes = {2 * read_metrics(folds / fold)["rows"]["train"] for fold in ("fold_1", "fold_2")}
        assert sum(facts["views"].values()) + facts["near_duplicates"] + facts["none"] in sizes
    status, errors = lab.run("--sweep augment=0,1,2 --epochs 3 --output_dir results/sweep")
    assert status == 0, errors
    alone = lab.done("alone", "--augment 1 --epochs 3")
    assert repeated_bytes(Path("results/sweep/augment_1")) == repeated_bytes(alone)
    assert repeated_bytes(Path("results/sweep/augment_2")) == repeated_bytes(lab.done("two", VIEWS))
    assert repeated_bytes(Path("results/sweep/augment_0")) == repeated_bytes(lab.done("none", "--epochs 3"))


def test_a_damaged_entry_is_made_again_and_a_dry_run_says_what_is_there(lab: TinyLab) -> None:
    assert "to compute: 2 views of each of 64 training texts, " in lab.run(f"{VIEWS} --dry_run")[1]
    whole = repeated_bytes(lab.done("whole", VIEWS))
    assert "there already: 2 views of each of 64 training texts, " in lab.run(f"{VIEWS} --dry_run")[1]
    table = next(Path("cache/views").glob("*/views.jsonl"))
    table.write_text(table.read_text(encoding="utf-8")[:100], encoding="utf-8")
    assert "to compute: 2 views of each of 64 training texts, " in lab.run(f"{VIEWS} --dry_run")[1]
    assert repeated_bytes(lab.done("again", VIEWS)) == whole


def test_a_table_of_probabilities_needs_a_model_that_scores_views(lab: TinyLab) -> None:
    rows = read_table(Path("data/comments.csv"))
    write_table(Path("probs.csv"), [list(rows[0]), *([row["text"], *(["0.3"] * 5)] for row in rows)])
    assert "--teacher_probs_path has no probabilities of views" in lab.refused(f"{VIEWS} --teacher_probs_path probs.csv")
    lab.done("beside", f"{VIEWS} --teacher_probs_path probs.csv --teacher_seeds 1 --with_control")
