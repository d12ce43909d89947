import pytest
import torch

from steersman.trainer.algorithm.products import matmul_nt


def slow(left, right):
    return torch.tensor([[sum(a * b for a, b in zip(x, y, strict=True)) for y in right] for x in left])


@pytest.mark.parametrize("transposed", [False, True])
def test_it_is_the_product_with_the_transpose(transposed):
    left = torch.randn(5, 7).T if transposed else torch.randn(7, 5)
    right = torch.randn(5, 3).T if transposed else torch.randn(3, 5)
    torch.testing.assert_close(matmul_nt(left, right), slow(left.tolist(), right.tolist()), atol=1e-5, rtol=1e-5)


def test_a_bias_and_leading_dimensions():
    left, right, bias = torch.randn(2, 4, 5), torch.randn(3, 5), torch.randn(3)
    expected = slow(left.reshape(8, 5).tolist(), right.tolist()) + bias
    torch.testing.assert_close(matmul_nt(left, right, bias), expected.view(2, 4, 3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_go_the_ordinary_way(dtype):
    left, right = torch.randn(4, 3, dtype=dtype), torch.randn(2, 3, dtype=dtype)
    assert torch.equal(matmul_nt(left, right), left @ right.T)


def test_empty_matrices():
    assert matmul_nt(torch.zeros(0, 3), torch.zeros(2, 3)).shape == (0, 2)
    assert torch.equal(matmul_nt(torch.zeros(2, 0), torch.zeros(3, 0)), torch.zeros(2, 3))
