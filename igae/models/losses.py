# SPDX-License-Identifier: Apache-2.0
"""Loss terms, as pure functions of tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor


def total_variation(x: Tensor, dims: tuple[int, int], weights: Tensor | None = None) -> Tensor:
    """Mean squared difference of neighbors along two dimensions, summed over both (a scalar).

    It is a mean per element, so neither the batch size nor the resolution changes its scale.

    Args:
        x: any shape in which both ``dims`` have at least two entries.
        dims: the two dimensions, e.g. (-2, -1) for [B, c, h, w], (2, 3) for planes [S, 3, R, R, C].
        weights: [len(x)], of the entries of x in the mean; they add up to 1. None: all the same.
    """
    total = x.new_zeros(())
    for dim in dims:
        squares = torch.diff(x, dim=dim).square()
        total = total + (squares.mean() if weights is None else squares.flatten(1).mean(1) @ weights)
    return total


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(logvar)) to N(0, 1), mean over all latent elements (a scalar).

    1/2 (mu^2 + sigma^2 - 1 - log sigma^2): Kingma & Welling, Auto-Encoding Variational Bayes, appendix B.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


def orthogonality(x: Tensor) -> Tensor:
    """Mean squared cosine of the angles between different entries of x [M, ...], M > 1 (a scalar in [0, 1]).

    ||G - I||^2 / (M (M - 1)) with G the products of the entries divided by their norms: 0 where all are orthogonal,
    whatever their lengths.
    """
    unit = F.normalize(x.flatten(1), dim=1)
    gram = unit @ unit.T
    return (gram - torch.diag(gram.diagonal())).square().sum() / (len(x) * (len(x) - 1))
