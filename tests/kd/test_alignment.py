"""Pooling tokens to the words two tokenizers share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research.kd.layers import pool_map, pool_states, token_to_word, word_mask
from research.kd.losses import attention_distance, hidden_distance

# "তুমি খুব ভালো" between two special tokens, cut by the teacher as [CLS] তু ##মি খুব ভা ##লো [SEP]
# and by the student as <s> তুমি খু ব ভালো </s>.
TEACHER_WORDS = torch.tensor([[0, 1, 1, 2, 3, 3, 4]])
STUDENT_WORDS = torch.tensor([[0, 1, 2, 2, 3, 4]])


def random_map(generator: torch.Generator, rows: int, tokens: int) -> torch.Tensor:
    return torch.rand(rows, tokens, tokens, generator=generator).softmax(dim=-1)


def test_states_of_a_sentence_worked_by_hand() -> None:
    teacher = torch.tensor([[[1.0], [2.0], [4.0], [8.0], [16.0], [32.0], [64.0]]])
    student = torch.tensor([[[1.0], [3.0], [6.0], [10.0], [24.0], [64.0]]])
    expected = torch.tensor([[[1.0], [3.0], [8.0], [24.0], [64.0]]])
    torch.testing.assert_close(pool_states(teacher, token_to_word(TEACHER_WORDS, 5)), expected)
    torch.testing.assert_close(pool_states(student, token_to_word(STUDENT_WORDS, 5)), expected)


def test_map_of_a_sentence_worked_by_hand() -> None:
    # Two words: the first of two tokens, the second of one.
    words = torch.tensor([[0, 0, 1]])
    tokens = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.25, 0.25, 0.5]]])
    expected = torch.tensor([[[(0.8 + 0.2) / 2, (0.2 + 0.8) / 2], [0.5, 0.5]]])
    torch.testing.assert_close(pool_map(tokens, token_to_word(words, 2)), expected)


def test_maps_of_two_segmentations_worked_by_hand() -> None:
    # Each token looks at two others, half and half; the word map counts where the words' tokens look.
    looks = {
        "teacher": [(0, 6), (2, 3), (2, 4), (3, 0), (5, 1), (5, 6), (6, 6)],
        "student": [(0, 5), (1, 2), (3, 4), (2, 4), (4, 1), (5, 0)],
    }
    # Rows and columns: [CLS], তুমি, খুব, ভালো, [SEP].
    expected = {
        "teacher": [[2, 0, 0, 0, 2], [0, 2, 1, 1, 0], [2, 0, 2, 0, 0], [0, 1, 0, 2, 1], [0, 0, 0, 0, 4]],
        "student": [[2, 0, 0, 0, 2], [0, 2, 2, 0, 0], [0, 0, 2, 2, 0], [0, 2, 0, 2, 0], [2, 0, 0, 0, 2]],
    }
    pooled = []
    for side, words in (("teacher", TEACHER_WORDS), ("student", STUDENT_WORDS)):
        tokens = torch.zeros(1, words.shape[1], words.shape[1])
        for query, keys in enumerate(looks[side]):
            for key in keys:
                tokens[0, query, key] += 0.5
        pooled.append(pool_map(tokens, token_to_word(words, 5)))
        torch.testing.assert_close(pooled[-1], torch.tensor([expected[side]]) / 4)
    # Cells that differ, in quarters: 1 1 in the second row, 2 2 in the third, 1 1 in the fourth, 2 2 in the last.
    squares = (1 + 1) + (4 + 4) + (1 + 1) + (4 + 4)
    assert attention_distance(pooled[0], pooled[1]).item() * 16 * 25 == pytest.approx(squares)


def test_rows_of_a_word_map_sum_to_one_even_when_tokens_are_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.tensor([[0, 1, -1, 2, 2, 3], [0, 1, 1, -1, -1, -1]])
    pooled = pool_map(random_map(generator, 2, 6), token_to_word(words, 4))
    present = word_mask(words, 4)
    torch.testing.assert_close(pooled.sum(dim=-1)[present], torch.ones(int(present.sum())))
    assert torch.isfinite(pooled).all()
    assert (pooled.sum(dim=-1)[~present] == 0).all()


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_both_paths_give_the_same_number_when_every_word_is_one_token(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, longest = len(lengths), max(lengths)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    words = torch.where(real, torch.arange(longest), torch.tensor(-1))
    membership, present = token_to_word(words, longest), word_mask(words, longest)
    assert torch.equal(present, real)
    teacher, student = (torch.randn(rows, longest, 4, generator=generator) for _ in range(2))
    by_token = hidden_distance(teacher, student, real)
    by_word = hidden_distance(pool_states(teacher, membership), pool_states(student, membership), present)
    torch.testing.assert_close(by_word, by_token)
    maps = []
    for _ in range(2):
        scores = torch.rand(rows, longest, longest, generator=generator)
        maps.append(scores.masked_fill(~real[:, None, :], -1e9).softmax(dim=-1))
    for objective in ("mse", "kl"):
        by_token = attention_distance(maps[0], maps[1], real, objective)
        pooled = [pool_map(side, membership) for side in maps]
        torch.testing.assert_close(attention_distance(pooled[0], pooled[1], present, objective), by_token)


def test_padding_on_either_side_changes_no_pooled_value() -> None:
    generator = torch.Generator().manual_seed(1)
    states, attention = torch.randn(1, 7, 3, generator=generator), random_map(generator, 1, 7)
    wider_words = torch.cat([TEACHER_WORDS, torch.full((1, 4), -1)], dim=1)
    wider_states = torch.cat([states, torch.full((1, 4, 3), 9.0)], dim=1)
    wider_attention = torch.zeros(1, 11, 11)
    wider_attention[:, :7, :7] = attention
    wider_attention[:, 7:, :] = 1 / 11
    narrow, wide = token_to_word(TEACHER_WORDS, 5), token_to_word(wider_words, 5)
    torch.testing.assert_close(pool_states(wider_states, wide), pool_states(states, narrow))
    torch.testing.assert_close(pool_map(wider_attention, wide), pool_map(attention, narrow))


def test_pooling_passes_gradients_to_every_token_of_a_word() -> None:
    states = torch.randn(1, 7, 3, requires_grad=True)
    pool_states(states, token_to_word(TEACHER_WORDS, 5)).sum().backward()
    assert states.grad is not None
    np.testing.assert_allclose(states.grad[0, :, 0], [1, 0.5, 0.5, 1, 0.5, 0.5, 1])


def test_half_precision_states_and_maps_are_pooled_in_float32() -> None:
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(1, 7, 3, generator=generator).bfloat16()
    attention = random_map(generator, 1, 7).bfloat16()
    membership = token_to_word(torch.tensor([[0, 1, 1, 1, 2, 2, 3]]), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled_states, pooled_map = pool_states(states, membership), pool_map(attention, membership)
    assert torch.equal(pooled_states, pool_states(states.float(), membership))
    torch.testing.assert_close(pooled_map.sum(dim=-1), torch.ones(1, 4), rtol=0, atol=1e-6)


def test_row_that_looks_at_no_shared_word_has_finite_gradients() -> None:
    attention = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]], requires_grad=True)
    membership = token_to_word(torch.tensor([[0, -1]]), 1)
    pooled = pool_map(attention, membership)
    assert pooled.item() == 0
    attention_distance(torch.ones(1, 1, 1), pooled, None, "kl").backward()
    assert attention.grad is not None
    assert torch.isfinite(attention.grad).all()
