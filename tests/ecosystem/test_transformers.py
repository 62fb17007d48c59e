"""Norms of Hugging Face's architectures against one backpropagation an example; benchmarks/zoo.py has larger models."""

import pytest
import torch
import zoo
import zoo_models

import engm

CASES = zoo_models.transformers()


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact(case, mode):
    torch.manual_seed(0)
    net = zoo.calm(case.make()).train(mode == "train")
    model, x = engm.GradNormModule(zoo.calm(net).double()), case.batch(3)
    report = engm.verify(model, zoo_models.losses_of, x.double() if x.is_floating_point() else x)
    in_parts = case.name in ("Gemma2ForCausalLM", "MambaForCausalLM", "Mamba2ForCausalLM")  # computed in float32
    tolerance = 1e-6 if in_parts else 1e-9
    assert report.error <= tolerance
    assert max(layer.error for layer in report.layers) <= tolerance
