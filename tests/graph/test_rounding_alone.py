"""Gradients that are rounding and nothing else, of what a softmax over one key leaves, are of nobody."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import per_example_gradients, relative, trained
from torch import Tensor, nn

import engm

pytestmark = pytest.mark.torch_insides
N = 4


class Attention(nn.Module):
    """Each example looks at what one key tells, another example's or its own, by three views of one tensor."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(5, 6), nn.Linear(6, 1), between
        self.double()

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        h = self.between(self.first(x))
        views = [h[None, None] for _ in range(3)]
        return self.last(F.scaled_dot_product_attention(*views, attn_mask=allowed[None, None])[0, 0].tanh())[:, 0]


@pytest.mark.parametrize("turned", [0, 1, 2])
@pytest.mark.parametrize("between", [lambda h: h, torch.tanh], ids=["a layer", "an activation"])
def test_one_key_a_query(between, turned):
    allowed = torch.eye(N).roll(turned, 0) > 0
    for seed in range(6):
        torch.manual_seed(seed)
        model = engm.GradNormModule(Attention(between))
        for _ in range(2):
            losses = model(torch.randn(N, 5).double(), allowed)
            truth = per_example_gradients(losses, trained(model)).norms
            assert relative(engm.per_example_grad_norms(model, losses), truth) <= 1e-9
