"""Embedding norms and weighted examples against their twins, on the CPU."""

import pytest
import torch
from hypothesis import given, settings
from oracle import per_example_gradients
from weighting_problems import (
    BAD_EMBEDDINGS,
    BAD_LISTS,
    check_embedding,
    check_scaled,
    check_sums,
    embeddings,
    lists_to_weight,
)

from engm import ops, reference

EXAMPLES = settings(max_examples=150, deadline=None)


@EXAMPLES
@given(problem=embeddings())
def test_embedding_norm_sq_is_its_twin(problem):
    check_embedding(ops.embedding_norm_sq(*problem), *problem)


def test_embedding_norm_sq_is_autograd():
    table = torch.nn.Embedding(11, 6, padding_idx=4, dtype=torch.float64)
    indices, gy = torch.randint(11, (5, 20)), torch.randn(5, 20, 6, dtype=torch.float64)
    want = per_example_gradients((table(indices) * gy).flatten(1).sum(1), {"table": table.weight}).norms.square()
    torch.testing.assert_close(ops.embedding_norm_sq(indices, gy, 4), want)


def test_embedding_norm_sq_where_all_indices_are_equal_and_where_all_are_padding():
    gy = torch.randn(3, 40, 5)
    indices = torch.full((3, 40), 7)
    torch.testing.assert_close(ops.embedding_norm_sq(indices, gy), gy.sum(1).square().sum(1))
    assert ops.embedding_norm_sq(indices, gy, 7).tolist() == [0, 0, 0]


@EXAMPLES
@given(problem=lists_to_weight())
def test_scale_examples_is_its_twin(problem):
    check_scaled(ops.scale_examples(*problem), *problem)


@EXAMPLES
@given(problem=lists_to_weight())
def test_weighted_sums_is_its_twin(problem):
    check_sums(ops.weighted_sums(*problem), *problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 3000, 4000])
def test_few_elements_and_many(size, dtype):
    """The CPU goes through few elements, 2^14 at most, in loops of its own."""
    problem = [torch.randn(5, size, dtype=dtype), torch.randn(size, 5, dtype=dtype).t()], torch.rand(5, dtype=dtype)
    check_scaled(ops.scale_examples(*problem), *problem)
    check_sums(ops.weighted_sums(*problem), *problem)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_of_zero_does_not_hide_what_is_not_finite(bad):
    t, weights = torch.ones(3, 4), torch.tensor([1.0, 0.0, 1.0])
    t[1, 2] = bad
    assert ops.scale_examples([t], weights)[0].isnan().nonzero().tolist() == [[1, 2]]
    assert ops.weighted_sums([t], weights)[0].isnan().nonzero().tolist() == [[2]]


def test_weighted_gemm_is_its_twin():
    a, b, weights = torch.randn(4, 9, 5), torch.randn(4, 9, 7), torch.rand(4)
    torch.testing.assert_close(ops.weighted_gemm(a, b, weights), reference.weighted_gemm(a, b, weights))


def test_opcheck():
    engm, weights = torch.ops.engm, torch.rand(3)
    image = torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last)
    tensors = [image, torch.randn(3, 6).bfloat16(), torch.randn(7, 3).t(), torch.randn(3), torch.randn(3, 0)]
    for op, arguments in [
        (engm.embedding_norm_sq, (torch.randint(4, (3, 5)), torch.randn(3, 5, 2))),
        (engm.embedding_norm_sq, (torch.randint(4, (3, 5)).int(), torch.randn(3, 5, 2).double(), 2)),
        (engm.scale_examples, (tensors, weights)),
        (engm.weighted_sums, (tensors, weights)),
        (engm.weighted_gemm, (torch.randn(3, 4, 5), torch.randn(3, 4, 6), weights)),
    ]:
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize(("arguments", "message"), BAD_EMBEDDINGS)
def test_bad_embeddings_are_refused(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        ops.embedding_norm_sq(*arguments)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_weighted_sums_of_complex_numbers(dtype):
    t, weights = torch.randn(3, 4, dtype=dtype), torch.rand(3)
    for tensor in (t, t.conj(), t[:, ::2]):
        torch.testing.assert_close(ops.weighted_sums([tensor], weights)[0], weights.to(dtype) @ tensor)


@pytest.mark.parametrize("op", [ops.scale_examples, ops.weighted_sums])
@pytest.mark.parametrize(("arguments", "message"), BAD_LISTS)
def test_bad_lists_are_refused(op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        op(*arguments)
