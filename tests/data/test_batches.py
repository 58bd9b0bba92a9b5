"""Rows become right-padded tensors, and each batch has the number of its loss terms."""

import pytest
import torch

from rlhf.data import EncodedResponse, PairBatch, Prompt, PromptBatch, RatingBatch, SequenceBatch, UnpairedBatch
from rlhf.data.preference import EncodedPair, PreferenceDataModule

ROWS = [EncodedResponse([1, 5, 6, 2], 2), EncodedResponse([1, 7, 8, 9, 9, 2], 3)]


def test_sequence_batch_by_hand() -> None:
    """Responses [6, 2] and [9, 9, 2]: the loss covers 5 of 10 real tokens, including EOS (2)."""
    batch = SequenceBatch.collate(ROWS)
    assert batch.input_ids.tolist() == [[1, 5, 6, 2, 0, 0], [1, 7, 8, 9, 9, 2]]
    assert batch.attention_mask.tolist() == [[True] * 4 + [False] * 2, [True] * 6]
    assert batch.response_mask.tolist() == [[False, False, True, True, False, False], [False] * 3 + [True] * 3]
    assert (batch.loss_terms, batch.token_count, batch.sequence_count) == (5, 10, 2)


def test_a_real_token_may_equal_the_padding_token() -> None:
    """Masks depend on lengths, not on ids: if the padding token is EOS, a mask by id would exclude EOS."""
    batch = SequenceBatch.collate([EncodedResponse([1, 0, 5, 0], 2), EncodedResponse([1, 5, 5, 5, 0], 1)])
    assert batch.attention_mask.sum(dim=1).tolist() == [4, 5]
    assert batch.response_mask.sum(dim=1).tolist() == [2, 4]


def test_the_first_token_has_no_loss() -> None:
    """Nothing precedes the first token, so it cannot be predicted, even if there is no prompt."""
    batch = SequenceBatch.collate([EncodedResponse([5, 6, 2], 0)])
    assert batch.response_mask.tolist() == [[False, True, True]]
    assert batch.loss_terms == 2


def test_chosen_responses_come_first() -> None:
    """Rows 0 and 1 are chosen, 2 and 3 rejected. The reference log-probs have the same order."""
    pairs = [
        EncodedPair(EncodedResponse([1, 10, 2], 1), EncodedResponse([1, 20, 2], 1), 0.5, (-1.0, -2.0)),
        EncodedPair(EncodedResponse([1, 11, 2], 1), EncodedResponse([1, 21, 22, 2], 1), 1.5, (-3.0, -4.0)),
    ]
    batch = PreferenceDataModule().collate(pairs)
    assert batch.sequences.input_ids[:, 1].tolist() == [10, 11, 20, 21]
    assert batch.margin.tolist() == [0.5, 1.5]
    assert batch.ref_logprobs.tolist() == [-1, -3, -2, -4]
    chosen, rejected = batch.halves(batch.ref_logprobs)
    assert (chosen.tolist(), rejected.tolist()) == ([-1, -3], [-2, -4])
    assert (batch.loss_terms, batch.sequence_count, batch.token_count) == (2, 4, 13)


def test_ref_logprobs_of_a_batch_are_complete_or_none() -> None:
    """One of two pairs has no reference log-probs."""
    encoded = EncodedResponse([1, 2], 1)
    pairs = [EncodedPair(encoded, encoded, 0.0, (-1.0, -2.0)), EncodedPair(encoded, encoded, 0.0)]
    assert PreferenceDataModule().collate(pairs).ref_logprobs is None


def test_loss_terms_of_ratings_and_prompts() -> None:
    """One term per rating, one term per prompt."""
    rating = RatingBatch(SequenceBatch.collate(ROWS), torch.tensor([0.5, 1.0]))
    assert (rating.loss_terms, rating.token_count, rating.sequence_count) == (2, 10, 2)
    prompts = PromptBatch([[1, 5], [1, 5, 6]], [Prompt([], "a"), Prompt([], "b")])
    assert (prompts.loss_terms, prompts.token_count, prompts.sequence_count) == (2, 5, 2)


def test_repeated_prompts_are_adjacent() -> None:
    """Two prompts, three times each: their token ids, records and row numbers stay together."""
    prompts = PromptBatch([[1, 5], [1, 5, 6]], [Prompt([], "a"), Prompt([], "b")], rows=[7, 3]).repeat(3)
    assert prompts.input_ids == [[1, 5]] * 3 + [[1, 5, 6]] * 3
    assert [prompt.raw_text for prompt in prompts.prompts] == [*"aaabbb"]
    assert prompts.rows == [7, 7, 7, 3, 3, 3]


def test_unpaired_batch_by_hand() -> None:
    """Responses of 2 and 3 tokens, the second one undesirable: 2 loss terms, and 2 tokens for an added SFT loss."""
    batch = UnpairedBatch(SequenceBatch.collate(ROWS), torch.tensor([True, False]), SequenceBatch.collate(ROWS[:1]))
    assert (batch.loss_terms, batch.sft_terms, batch.sequence_count, batch.token_count) == (2, 2, 2, 10)
    assert batch.to("meta").mismatched.input_ids.device.type == "meta"


def test_sft_terms_are_the_tokens_of_chosen_responses() -> None:
    """A chosen response of 2 tokens and a rejected one of 3. A batch of demonstrations has no added SFT loss."""
    batch = PairBatch(SequenceBatch.collate(ROWS), torch.zeros(1))
    assert (batch.loss_terms, batch.sft_terms) == (1, 2)
    assert SequenceBatch.collate(ROWS).sft_terms == 0


@pytest.mark.parametrize("ref_logprobs", [None, torch.zeros(4)])
def test_to_moves_all_tensors(ref_logprobs: torch.Tensor | None) -> None:
    """Tensors of nested batches move, too. Weights and term counts are copied; the old batch is unchanged."""
    batch = PairBatch(SequenceBatch.collate(ROWS), torch.zeros(2), ref_logprobs, loss_weight=0.25)
    moved = batch.to("meta")
    tensors = [moved.sequences.input_ids, moved.sequences.attention_mask, moved.sequences.response_mask, moved.margin]
    tensors += [] if ref_logprobs is None else [moved.ref_logprobs]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.loss_weight, moved.sequences.terms) == (0.25, 5)
    assert batch.sequences.input_ids.device.type == "cpu"


def test_selected_rows_have_weights_in_proportion_to_their_terms() -> None:
    """Responses of 2 and 3 tokens in a batch of weight 2: the weights are 2 * 2/5 and 2 * 3/5."""
    batch = SequenceBatch.collate(ROWS)
    batch.loss_weight, batch.rows = 2.0, [7, 9]
    one, other = batch.select([0]), batch.select([1])
    assert (one.loss_weight, other.loss_weight) == pytest.approx((0.8, 1.2))
    assert (one.terms, one.tokens, one.rows, other.rows) == (2, 4, [7], [9])
    assert torch.equal(other.input_ids, batch.input_ids[1:])


def test_selected_pairs_keep_both_responses() -> None:
    """Pairs 1 and 2 of three: sequences 1 and 2 are chosen, 4 and 5 rejected. Their chosen responses have 3 tokens."""
    sequences = [EncodedResponse([1, 10 + number, *[3] * (number % 2), 2], 2) for number in range(6)]
    log_probs = torch.arange(6.0)
    batch = PairBatch(SequenceBatch.collate(sequences), torch.tensor([0.0, 1.0, 2.0]), log_probs, sft_loss_weight=1.0)
    pairs = batch.select([1, 2])
    assert pairs.sequences.input_ids[:, 1].tolist() == [11, 12, 14, 15]
    assert pairs.ref_logprobs is not None
    assert pairs.ref_logprobs.tolist() == [1, 2, 4, 5]
    assert pairs.margin.tolist() == [1, 2]
    assert (pairs.loss_weight, pairs.chosen_tokens) == (pytest.approx(2 / 3), 3)
    assert pairs.sft_loss_weight == pytest.approx(3 / 4)


def test_selected_unpaired_rows_count_desirable_ones_again() -> None:
    batch = UnpairedBatch(SequenceBatch.collate(ROWS), torch.tensor([True, False]), SequenceBatch.collate(ROWS))
    selected = batch.select([1])
    assert (selected.desirable_rows, selected.desirable_tokens, selected.loss_terms) == (0, 0, 1)
    assert selected.mismatched.terms == 3
