"""Where the examples lie in a tensor: every layout is undone by its inverse."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from engm.terms.layout import Layout

LAYOUTS = st.builds(Layout, st.integers(0, 1), st.integers(1, 4), st.integers(1, 4))


@given(LAYOUTS, st.integers(1, 5), st.integers(1, 3), st.integers(0, 2))
def test_rows_of_an_example_come_together_and_go_back(layout, n, other, more):
    length = layout.outer * n * layout.inner
    shape = (length, other, *[2] * more) if layout.dim == 0 else (other, length, *[2] * more)
    example = torch.arange(n).repeat_interleave(layout.inner).repeat(layout.outer)
    tensor = torch.rand(shape)
    marked = example.view([-1 if d == layout.dim else 1 for d in range(len(shape))]).expand(shape)
    rows = layout.examples_first(marked, n)
    assert rows.shape[:2] == (n, layout.rows)
    assert bool((rows.flatten(1) == torch.arange(n).unsqueeze(1)).all())
    assert torch.equal(layout.from_examples(layout.examples_first(tensor, n)), tensor)
    flat = layout.flattened(shape).examples_first(tensor.flatten(0, 1) if layout.dim else tensor, n)
    assert torch.equal(flat.flatten(1).sort(1).values, layout.examples_first(tensor, n).flatten(1).sort(1).values)
