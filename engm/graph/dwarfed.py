"""Tensors that may seem to be of one example because its share dwarfs those of others.

The share of an example in a sum is lost where another's is so many times as large as a type of number has digits: its
loss may be, or the numbers that it is multiplied by. A weight under a mask then looks like a row of that example.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..torch_internals import operator_name
from .arrangement import Arrangements
from .owners import Key
from .routing import ELEMENTWISE, HANDING_ON, MOVING
from .structure import Structure


def may_be_dwarfed(structure: Structure, about: Arrangements, nodes: Mapping[Key, Tensor]) -> set[int]:
    """Nodes in which some examples seem to have no share though what reads them has rows of these, and all below.

    Operators that hand on to an element what comes to one element of theirs add up no shares.

    Args:
        structure: of the graph.
        about: tells how the examples lie.
        nodes: by output of a node, the owners of its rows.
    """
    traced, found = structure.traced, set()
    for position, node in enumerate(traced.order):
        own = nodes.get((position, 0))
        if own is None or not about.present(own).apart or about.present(own).several:
            continue
        name = operator_name(node)
        if name in MOVING or name in HANDING_ON:
            continue
        for slot, child in enumerate(traced.children[position]):
            if child is None or child < 0 or child in found or not structure.trains[child]:
                continue
            number = node.next_functions[slot][1]
            given = nodes.get((child, number))
            if given is None or given is own or about.present(given).several or not about.present(given).anybody:
                continue
            if name in ELEMENTWISE and traced.shapes[child][number] == traced.shapes[position][0]:
                continue
            if bool((about.examples(own) & ~about.examples(given)).any()):
                found.add(child)
    return structure.below(found, structure.looked_at) if found else found
