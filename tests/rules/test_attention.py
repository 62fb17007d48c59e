"""Attention and transformer modules of torch, in every option."""

import pytest
import torch
from engine_checks import check
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import random_losses, tensor
from torch import nn

pytestmark = pytest.mark.torch_insides


class Attention(nn.Module):
    def __init__(self, shared=False, **options):
        super().__init__()
        self.attention, self.shared = nn.MultiheadAttention(8, 2, **options), shared

    def forward(self, query, key, value, **masks):
        if self.shared:
            key = value = query
        out, weights = self.attention(query, key, value, **masks)
        out = out if self.attention.batch_first else out.transpose(0, 1)
        return out if weights is None else out + weights.flatten(1).sum(1)[:, None, None]


@settings(max_examples=30)
@given(
    n=st.integers(1, 4),
    steps=st.integers(1, 4),
    memory=st.integers(1, 4),
    batch_first=st.booleans(),
    bias=st.booleans(),
    add_bias_kv=st.booleans(),
    add_zero_attn=st.booleans(),
    shared=st.sampled_from(["all", "keys and values", "none"]),
    sizes=st.booleans(),
    need_weights=st.booleans(),
)
def test_multihead_attention(
    n, steps, memory, batch_first, bias, add_bias_kv, add_zero_attn, shared, sizes, need_weights
):
    options = {"batch_first": batch_first, "bias": bias, "add_bias_kv": add_bias_kv, "add_zero_attn": add_zero_attn}
    sizes = sizes and shared == "none"
    net = Attention(shared == "all", **options, **({"kdim": 3, "vdim": 5} if sizes else {})).double()
    query = tensor(n, steps, 8)
    key, value = tensor(n, memory, 3 if sizes else 8, seed=1), tensor(n, memory, 5 if sizes else 8, seed=2)
    value = key if shared == "keys and values" else value
    tensors = [t if batch_first else t.transpose(0, 1) for t in (query, key)]
    tensors.append(tensors[1] if value is key else value if batch_first else value.transpose(0, 1))
    check(net, lambda m: random_losses(m(*tensors, need_weights=need_weights)))


def test_masks():
    x = tensor(3, 4, 8)
    padding = torch.tensor([[False] * 4, [False] * 3 + [True], [False, True, True, True]])
    net = Attention(batch_first=True).double()
    check(net, lambda m: random_losses(m(x, x, x, key_padding_mask=padding)))
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    check(net, lambda m: random_losses(m(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_transformer(batch_first, norm_first, mode):
    net = nn.Transformer(8, 2, 2, 1, 12, dropout=0.0, batch_first=batch_first, norm_first=norm_first).double()
    getattr(net, mode)()
    source, target = tensor(3, 4, 8), tensor(3, 2, 8, seed=1)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    check(net, lambda m: random_losses(m(source, target) if batch_first else m(source, target).transpose(0, 1)))


def test_encoder_with_padding_and_positions():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.positions = nn.Embedding(11, 8, padding_idx=0), nn.Embedding(6, 8)
            layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

        def forward(self, words):
            h = self.words(words) + self.positions(torch.arange(words.shape[1]))
            return self.head(self.encoder(h, src_key_padding_mask=words == 0)[:, 0])

    words = torch.tensor([[1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 9], [3, 3, 3, 3, 0, 0]])
    net = Classifier().double()
    check(net, lambda m: random_losses(m(words)))
    check(net, lambda m: random_losses(m(words[:, :3])))  # as many positions as examples
