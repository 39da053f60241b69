"""Packed micro-batches: one example with every tensor written out, and how scored positions pair with targets."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remax_megatron.batching.packed import PackedBatch, pack
from remax_megatron.types import Row

ROWS = [
    Row((11, 12), [13, 14, 15], [0.5, 0.5, 0.5], [-0.1, -0.2, -0.3], [-0.11, -0.21, -0.31]),
    Row((99,), [98], [9.0], [-9.0], [-9.1]),  # in no micro-batch of the example
    Row((21, 22, 23), [24], [-1.0], [-0.4], [-0.41]),
]


def expect(tensor: torch.Tensor, values: list, dtype: torch.dtype) -> None:
    torch.testing.assert_close(tensor, torch.tensor(values, dtype=dtype), rtol=0, atol=0)


def test_every_tensor_of_an_example() -> None:
    batch = pack(ROWS, [2, 0], pad_to=4, pad_limit=100)
    # packed:  0  1  2  3 | 4  5  6  7  8 | 9 10 11      row 2, row 0, padding row
    #         21 22 23 24 |11 12 13 14 15 | 0  0  0      9 tokens, 12 with padding
    # Position 2 predicts 24; positions 5, 6, 7 predict 13, 14, 15.
    assert batch.rows == [2, 0] and batch.num_tokens == 9 and batch.max_seqlen == 5
    expect(batch.tokens_T, [21, 22, 23, 24, 11, 12, 13, 14, 15, 0, 0, 0], torch.int64)
    expect(batch.positions_T, [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2], torch.int64)
    expect(batch.cu_seqlens, [0, 4, 9, 12], torch.int32)
    expect(batch.position_R, [2, 5, 6, 7], torch.int64)
    expect(batch.target_R, [24, 13, 14, 15], torch.int64)
    expect(batch.advantage_R, [-1.0, 0.5, 0.5, 0.5], torch.float32)
    expect(batch.rollout_logprob_R, [-0.4, -0.1, -0.2, -0.3], torch.float32)
    assert batch.old_logprob_R is not None
    expect(batch.old_logprob_R, [-0.41, -0.11, -0.21, -0.31], torch.float32)


def test_tensors_of_one_type_share_memory_and_start_aligned() -> None:
    batch = pack(ROWS, [2, 0], pad_to=4, pad_limit=100)
    assert batch.old_logprob_R is not None
    whole = [batch.tokens_T, batch.positions_T, batch.position_R, batch.target_R]
    real = [batch.advantage_R, batch.rollout_logprob_R, batch.weight_R, batch.old_logprob_R]
    for tensors in (whole, real):
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
        # 64 bytes or more: the address of no tensor differs from another's by less than a GPU's vector loads.
        assert all(tensor.storage_offset() % 16 == 0 for tensor in tensors)


def test_no_padding_row_when_the_length_is_a_multiple() -> None:
    batch = pack(ROWS, [2, 0], pad_to=3, pad_limit=100)
    expect(batch.cu_seqlens, [0, 4, 9], torch.int32)
    assert len(batch.tokens_T) == len(batch.positions_T) == 9


def test_padding_stops_at_the_limit() -> None:
    # 9 tokens to a multiple of 8 would be 16; the budget is 12.
    batch = pack(ROWS, [2, 0], pad_to=8, pad_limit=12)
    expect(batch.cu_seqlens, [0, 4, 9, 12], torch.int32)
    # A budget that is already full leaves no room for a padding row.
    expect(pack(ROWS, [2, 0], pad_to=8, pad_limit=9).cu_seqlens, [0, 4, 9], torch.int32)
    # A micro-batch shorter than `pad_to` is filled up to it even where the limit is below.
    expect(pack(ROWS, [2], pad_to=8, pad_limit=5).cu_seqlens, [0, 4, 8], torch.int32)


def test_an_empty_micro_batch_is_padding_only() -> None:
    for pad_to in (1, 4):
        batch = pack(ROWS, [], pad_to=pad_to, pad_limit=100)
        assert batch.rows == [] and batch.num_tokens == 0 and batch.max_seqlen == pad_to
        expect(batch.tokens_T, [0] * pad_to, torch.int64)
        expect(batch.positions_T, list(range(pad_to)), torch.int64)
        expect(batch.cu_seqlens, [0, pad_to], torch.int32)
        for scored in (batch.position_R, batch.target_R):
            expect(scored, [], torch.int64)
        for values in (batch.advantage_R, batch.rollout_logprob_R):
            expect(values, [], torch.float32)
        assert batch.old_logprob_R is None


def test_old_logprobs_are_none_when_rows_have_none() -> None:
    row = Row((1,), [2], [0.0], [0.0])
    assert pack([row, row], [0, 1], pad_to=1, pad_limit=9).old_logprob_R is None


@st.composite
def random_rows(draw: st.DrawFn) -> list[Row]:
    """Rows whose tokens are all different and not 0, and whose per-token floats are those of the target token."""
    rows, token = [], 0
    for _ in range(draw(st.integers(1, 8))):
        prompt, response = draw(st.integers(1, 12)), draw(st.integers(0, 12))
        ids = list(range(token + 1, token + 1 + prompt + response))
        token += prompt + response
        answer = ids[prompt:]
        rows.append(Row(tuple(ids[:prompt]), answer, [t + 0.25 for t in answer], [-t - 0.5 for t in answer]))
    return rows


@settings(max_examples=150, deadline=None)
@given(random_rows(), st.data())
def test_positions_pair_with_targets(rows: list[Row], data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1), unique=True))
    pad_to = data.draw(st.integers(1, 16))
    batch: PackedBatch = pack(rows, indices, pad_to=pad_to, pad_limit=10_000)
    padding = len(batch.tokens_T) - batch.num_tokens
    assert len(batch.tokens_T) % pad_to == 0 and batch.num_tokens == sum(rows[i].num_tokens for i in indices)
    assert padding < pad_to if indices else padding == pad_to
    # The hidden state at position p predicts the token at p + 1: it is the target, in the same row.
    torch.testing.assert_close(batch.tokens_T[batch.position_R + 1], batch.target_R, rtol=0, atol=0)
    segment = torch.bucketize(torch.arange(len(batch.tokens_T)), batch.cu_seqlens[1:], right=True)
    assert torch.equal(segment[batch.position_R], segment[batch.position_R + 1])
    # All response tokens of the rows asked for, once each and in that order, with their own advantage and logprob.
    assert batch.target_R.tolist() == [t for i in indices for t in rows[i].response_ids]
    assert torch.equal(batch.advantage_R, batch.target_R + 0.25)
    assert torch.equal(batch.rollout_logprob_R, -batch.target_R - 0.5)
    # cu_seqlens cuts exactly the rows (then the padding), and positions start anew in each.
    cuts = batch.cu_seqlens.tolist()
    assert cuts[0] == 0 and cuts[-1] == len(batch.tokens_T)
    pieces = [batch.tokens_T[a:b].tolist() for a, b in zip(cuts, cuts[1:], strict=False)]
    assert pieces[: len(indices)] == [[*rows[i].prompt_ids, *rows[i].response_ids] for i in indices]
    assert all(set(piece) == {0} for piece in pieces[len(indices) :])
    assert batch.positions_T.tolist() == [p for piece in pieces for p in range(len(piece))]
    assert batch.max_seqlen == max(len(piece) for piece in pieces)
