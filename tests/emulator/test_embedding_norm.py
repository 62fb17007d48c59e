"""The CUDA kernels of embedding_norm_sq against the twin, run by the emulator."""

import pytest
import torch
from hypothesis import given, settings
from weighting_problems import BAD_EMBEDDINGS, DTYPES, check_embedding, embeddings

EXAMPLES = settings(max_examples=80, deadline=None)


@EXAMPLES
@given(problem=embeddings())
def test_is_its_twin(emulated, problem):
    check_embedding(emulated.embedding_norm_sq(*problem), *problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 256, 300])
def test_chains_across_chunks_of_positions(emulated, dtype, T):
    """All indices equal, all different, every third equal: chains are shorter and longer than the rows in flight."""
    indices = torch.stack([torch.zeros(T), torch.arange(T), torch.arange(T) % 3]).long()
    gy = torch.randn(3, T, 16).to(dtype)
    for padding_idx in (-1, 2):
        check_embedding(emulated.embedding_norm_sq(indices, gy, padding_idx), indices, gy, padding_idx)


def test_only_padding_has_norm_zero(emulated):
    assert emulated.embedding_norm_sq(torch.full((2, 5), 3), torch.randn(2, 5, 4), 3).tolist() == [0, 0]


def test_what_is_not_finite_stays_in_its_example(emulated):
    gy = torch.randn(3, 4, 5)
    gy[1, 2, 3] = float("nan")
    assert emulated.embedding_norm_sq(torch.randint(3, (3, 4)), gy).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(("arguments", "message"), BAD_EMBEDDINGS)
def test_bad_arguments_are_refused(emulated, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        emulated.embedding_norm_sq(*arguments)
