"""Batches of similar length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.builders import requires_shared, shared_path

from research.models.encoders import load_tokenizer
from research.storage.arrays import gather_ragged
from research.storage.cache import Cache
from research.text.batches import BatchLoader, length_batches, padding_ratio
from research.text.tokens import Tokens, tokenize
from research_data import load_comments


def test_gathered_rows_are_padded_to_their_own_longest_even_when_some_are_empty() -> None:
    flat, offsets = np.arange(10, 16), np.array([0, 2, 2, 5, 6, 6])
    padded, real = gather_ragged(flat, offsets, np.array([4, 2, 0, 1]), -7)
    assert padded.tolist() == [[-7, -7, -7], [12, 13, 14], [10, 11, -7], [-7, -7, -7]]
    assert real.sum(axis=1).tolist() == [0, 3, 2, 0]


def make_loader(seed: int | None, rows: int = 103) -> BatchLoader:
    generator = np.random.default_rng(3)
    lengths = generator.geometric(0.1, rows)
    tokens = Tokens(
        generator.integers(2, 50, lengths.sum()).astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]), None, 1, "key"
    )
    return BatchLoader(np.arange(rows), tokens, np.zeros((rows, 2), dtype=np.float32), 8, seed=seed)


@pytest.mark.parametrize("seed", [None, 7])
def test_an_epoch_holds_every_row_once_unpadded_rows_unchanged(seed: int | None) -> None:
    loader = make_loader(seed)
    seen = []
    for batch in loader.iterate(epoch=2):
        for row, ids, mask in zip(batch["row"], batch["input_ids"], batch["attention_mask"], strict=True):
            start, stop = loader.tokens.offsets[row : row + 2]
            assert ids[mask.bool()].tolist() == loader.tokens.ids[start:stop].tolist()
            assert (ids[~mask.bool()] == 1).all()
            seen.append(int(row))
    assert sorted(seen) == list(range(103))
    assert len(loader) == len(loader.plan(0)) == 13


def test_batches_differ_between_epochs_and_repeat_with_the_seed() -> None:
    def plan(seed: int, epoch: int) -> list[list[int]]:
        return [batch.tolist() for batch in make_loader(seed).plan(epoch)]

    assert plan(1, 0) == plan(1, 0)
    assert plan(1, 0) != plan(1, 1)
    assert plan(1, 0) != plan(2, 0)


@pytest.mark.parametrize("seed", [None, 7])
def test_batches_of_a_plan_are_places_in_one_order_and_lengths_take_four_bytes(seed: int | None) -> None:
    loader = make_loader(seed)
    batches = loader.plan(0)
    order = batches[0].base
    assert order is not None and order.nbytes == 8 * 103 and all(batch.base is order for batch in batches)
    assert loader.lengths.nbytes == 4 * 103
    assert loader.lengths.tolist() == np.diff(loader.tokens.offsets).tolist()


def test_skipping_batches_goes_on_where_the_epoch_was() -> None:
    loader = make_loader(5)
    whole = [batch["row"].tolist() for batch in loader.iterate(1)]
    assert [batch["row"].tolist() for batch in loader.iterate(1, skip=4)] == whole[4:]


def test_batches_without_a_seed_go_from_long_to_short() -> None:
    lengths = np.array([3, 9, 1, 7])
    assert [batch.tolist() for batch in length_batches(lengths, 2)] == [[1, 3], [0, 2]]


def test_a_token_budget_ends_a_batch_before_its_padded_tokens_exceed_it() -> None:
    lengths = np.array([3, 9, 1, 7, 2, 3])
    batches = length_batches(lengths, 3, token_budget=8)
    # A row longer than the budget is a batch by itself, and three short rows are all that batch_size allows.
    assert [batch.tolist() for batch in batches] == [[1], [3], [0, 5], [4, 2]]
    assert [len(batch) for batch in length_batches(lengths, 3, token_budget=1000)] == [3, 3]


def test_a_loader_with_a_token_budget_counts_its_batches() -> None:
    loader = make_loader(None)
    loader.token_budget = 40
    assert len(loader) == len(list(loader)) > 13


@requires_shared
def test_padding_on_the_real_comments_is_under_four_percent(tmp_path: Path) -> None:
    comments = load_comments(shared_path("data", "bn_cyberbully5.csv"))
    tokenizer = load_tokenizer(str(shared_path("models", "me5-small-bn")))
    tokens = tokenize(comments, tokenizer, 128, Cache(tmp_path), with_words=False)
    loader = BatchLoader(np.arange(len(comments)), tokens, comments.labels, 32, seed=0)
    assert padding_ratio(loader) <= 1.04


def test_epochs_read_their_turns_only_and_take_as_many_steps() -> None:
    plain = make_loader(5)
    generator = np.random.default_rng(0)
    turns = np.stack([np.sort(generator.choice(103, size=20, replace=False)) for _ in range(3)])
    loader = BatchLoader(plain.rows, plain.tokens, plain.labels, 8, seed=5, turns=turns)
    assert len(loader) == 3 and loader.num_rows == 20
    for epoch in range(6):
        batches = list(loader.iterate(epoch))
        assert sorted(np.concatenate([batch["index"] for batch in batches]).tolist()) == turns[epoch % 3].tolist()
        assert [batch["index"].tolist() for batch in loader.iterate(epoch, skip=1)] == [
            batch["index"].tolist() for batch in batches[1:]
        ]
        lengths = loader.lengths[turns[epoch % 3]]
        expected = length_batches(lengths, 8, seed=5, epoch=epoch)
        assert [batch.tolist() for batch in loader.plan(epoch)] == [turns[epoch % 3][batch].tolist() for batch in expected]
        assert padding_ratio(loader, epoch) == pytest.approx(
            sum(len(batch) * lengths[batch].max() for batch in expected) / lengths.sum()
        )
    every = BatchLoader(plain.rows, plain.tokens, plain.labels, 8, seed=5, turns=np.arange(103)[None])
    assert [batch["index"].tolist() for batch in every] == [batch["index"].tolist() for batch in plain]
