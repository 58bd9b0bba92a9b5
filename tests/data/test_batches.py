"""Rows become right-padded tensors, and each batch knows how many terms its loss has."""

import pytest
import torch

from rlhf.data import EncodedResponse, PairBatch, Prompt, PromptBatch, RatingBatch, SequenceBatch, UnpairedBatch
from rlhf.data.preference import EncodedPair, PreferenceDataModule

ROWS = [EncodedResponse([1, 5, 6, 2], 2), EncodedResponse([1, 7, 8, 9, 9, 2], 3)]


def test_text_batch_by_hand() -> None:
    """Answers [6, 2] and [9, 9, 2]: 5 tokens to learn of 10 real ones; the last is EOS and is learned."""
    batch = SequenceBatch.collate(ROWS)
    assert batch.input_ids.tolist() == [[1, 5, 6, 2, 0, 0], [1, 7, 8, 9, 9, 2]]
    assert batch.attention_mask.tolist() == [[True] * 4 + [False] * 2, [True] * 6]
    assert batch.response_mask.tolist() == [[False, False, True, True, False, False], [False] * 3 + [True] * 3]
    assert (batch.loss_terms, batch.token_count, batch.sequence_count) == (5, 10, 2)


def test_a_pad_token_among_the_real_ones_stays_real() -> None:
    """Token 0 is padding by place only: with pad = eos a mask by id would drop the EOS."""
    batch = SequenceBatch.collate([EncodedResponse([1, 0, 5, 0], 2), EncodedResponse([1, 5, 5, 5, 0], 1)])
    assert batch.attention_mask.sum(dim=1).tolist() == [4, 5]
    assert batch.response_mask.sum(dim=1).tolist() == [2, 4]


def test_the_first_token_is_never_learned() -> None:
    """Nothing stands before it: an answer without a prompt loses its first token."""
    batch = SequenceBatch.collate([EncodedResponse([5, 6, 2], 0)])
    assert batch.response_mask.tolist() == [[False, True, True]]
    assert batch.loss_terms == 2


def test_pairs_stand_chosen_first() -> None:
    """Rows 0 and 1 are chosen, 2 and 3 rejected, and the reference's log-probs follow the same order."""
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


def test_a_reference_that_is_not_known_for_all_is_not_given() -> None:
    """A half-filled column would train against made-up numbers."""
    coded = EncodedResponse([1, 2], 1)
    pairs = [EncodedPair(coded, coded, 0.0, (-1.0, -2.0)), EncodedPair(coded, coded, 0.0)]
    assert PreferenceDataModule().collate(pairs).ref_logprobs is None


def test_loss_terms_of_ratings_and_prompts() -> None:
    """One term a rating, one a prompt."""
    rating = RatingBatch(SequenceBatch.collate(ROWS), torch.tensor([0.5, 1.0]))
    assert (rating.loss_terms, rating.token_count, rating.sequence_count) == (2, 10, 2)
    prompts = PromptBatch([[1, 5], [1, 5, 6]], [Prompt([], "a"), Prompt([], "b")])
    assert (prompts.loss_terms, prompts.token_count, prompts.sequence_count) == (2, 5, 2)


def test_verdict_batch_by_hand() -> None:
    """Answers of 2 and 3 tokens, the second one undesirable: 2 terms of the loss, 2 tokens for an SFT term."""
    batch = UnpairedBatch(SequenceBatch.collate(ROWS), torch.tensor([True, False]), SequenceBatch.collate(ROWS[:1]))
    assert (batch.loss_terms, batch.sft_terms, batch.sequence_count, batch.token_count) == (2, 2, 2, 10)
    assert batch.to("meta").mismatched.input_ids.device.type == "meta"


def test_sft_terms_are_the_tokens_of_the_better_answers() -> None:
    """Chosen answers of 2 tokens, rejected ones of 3; a batch of plain texts has no such term."""
    batch = PairBatch(SequenceBatch.collate(ROWS), torch.zeros(1))
    assert (batch.loss_terms, batch.sft_terms) == (1, 2)
    assert SequenceBatch.collate(ROWS).sft_terms == 0


@pytest.mark.parametrize("reference", [None, torch.zeros(4)])
def test_a_batch_moves_with_all_its_tensors(reference: torch.Tensor | None) -> None:
    """Nested batches too; share and terms are kept, and the batch that was moved stays where it was."""
    batch = PairBatch(SequenceBatch.collate(ROWS), torch.zeros(2), reference, loss_weight=0.25)
    moved = batch.to("meta")
    tensors = [moved.sequences.input_ids, moved.sequences.attention_mask, moved.sequences.response_mask, moved.margin]
    tensors += [] if reference is None else [moved.ref_logprobs]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.loss_weight, moved.sequences.terms) == (0.25, 5)
    assert batch.sequences.input_ids.device.type == "cpu"
