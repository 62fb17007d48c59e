"""What one layer call contributes to the gradient of each of its parameters, in the form it is cheapest to keep.

A *term* stands for the per-example gradients ``g_i`` of one parameter tensor without (usually) holding them:

==========================  =====================================  =========================================
term                        per-example gradient                   kept
==========================  =====================================  =========================================
:class:`PerExampleGradient` ``g_i`` itself                         ``[n, *shape]``: bias, scale, shift
:class:`LinearFactors`      ``B_i^T A_i``                          activations and backprops
:class:`BilinearFactors`    ``sum_t b_t (x) x_t (x) y_t``          both inputs and backprops
:class:`ConvFactors`        ``B_i^T patches(X_i)``                 input and output gradient, never patches
:class:`EmbeddingFactors`   backprops summed by index              indices and backprops
:class:`TiedTable`          of an embedding and a projection       the factors of both
:class:`Scattered`          the sum over the rows it owns           a term of all rows, and their owners
:class:`Stacked`            matrices in one parameter              a term of each
:class:`Reshaped`           another term's, in another shape       that term
:class:`MixedTerm`          the sum of any terms                   those terms
==========================  =====================================  =========================================

A parameter used more than once has one term a use. :func:`combine` adds them *before* the norm is taken, so that the
norm holds the cross terms between uses: adding the squared norms of the uses would be wrong.
"""

from ..ops import accumulation_dtype
from .base import (
    CHUNK_BYTES,
    LocalCorrection,
    PerExampleGradient,
    Term,
    squared_norm_of_dense,
    squared_rows,
)
from .combination import MixedTerm, combine
from .convolution import ConvFactors, ConvGeometry, conv_weight_gradient
from .embedding import EmbeddingFactors, TiedTable
from .factors import Factors, PositionFactors
from .linear import BilinearFactors, LinearFactors
from .owners import NOBODY, Owners
from .reshaped import Reshaped
from .scattered import Scattered
from .stacked import Stacked
from .sums import weighted_sums

__all__ = [
    "CHUNK_BYTES",
    "NOBODY",
    "BilinearFactors",
    "ConvFactors",
    "ConvGeometry",
    "EmbeddingFactors",
    "Factors",
    "LinearFactors",
    "LocalCorrection",
    "MixedTerm",
    "Owners",
    "PerExampleGradient",
    "PositionFactors",
    "Reshaped",
    "Scattered",
    "Stacked",
    "Term",
    "TiedTable",
    "accumulation_dtype",
    "combine",
    "conv_weight_gradient",
    "squared_norm_of_dense",
    "squared_rows",
    "weighted_sums",
]
