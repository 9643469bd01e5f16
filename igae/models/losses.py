# SPDX-License-Identifier: Apache-2.0
"""Loss terms, as pure functions of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from igae.models.views import Views


@dataclass
class LossInputs:
    """What a loss of an installed package gets: B views of S scenes, rendered at h x w latent pixels of g x g rays.

    Attributes:
        planes: [S, 3, R, R, C]; `views.index` says which of them a view shows.
        rendered: normalized latents [B, c, h, w] in [-1, 1].
        depth, opacity: [B, h g, w g].
        latents: [B, c, h, w] of the encoder, before they are normalized.
        images: the views [B, 3, H, W] in [-1, 1]; None where latents were encoded before.
        decoded: decoded renders [B, 3, H, W]; None where no loss needs images.
    """

    views: Views
    planes: Tensor
    rendered: Tensor
    depth: Tensor
    opacity: Tensor
    latents: Tensor | None
    images: Tensor | None = None
    decoded: Tensor | None = None


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


ROUNDS = 4
"""Of looking for cells that are connected to the border, along rows and columns: the way to one that is not found turns
more than eight times, and all that is lost is that it is not known to be empty."""


def coverage_bounds(masks: Tensor, has_alpha: Tensor, size: Sequence[int]) -> Tensor:
    """How much of each cell of a view objects cover: at least and at most, float32 [B, 2, h, w] in [0, 1].

    With alpha both are its mean over the cell. Without, a mask says where a pixel differs from the background: objects
    cover at least those of these pixels that have no others beside them. Cells without any are empty if they are
    connected to the border; others may show a part of an object that has the background's color.

    Args:
        masks: uint8 [B, H, W], H and W multiples of h and w.
        has_alpha: bool [B].
        size: (h, w).
    """
    cell = masks.shape[1] // size[0], masks.shape[2] // size[1]
    masks, exact = masks[:, None].float() / 255, has_alpha[:, None, None, None]
    # What differs from the background may be mixed with it at an edge, so the outermost pixels don't count.
    inner = torch.where(exact, masks, -F.max_pool2d(-masks, 3, 1, 1))
    least, empty = F.avg_pool2d(inner, cell), F.max_pool2d(masks, cell) == 0
    reached = empty.clone()
    reached[..., 1:-1, 1:-1] = False
    for _ in range(ROUNDS):
        for dim in (-1, -2):
            reached = _spread(_spread(reached, empty, dim).flip(dim), empty.flip(dim), dim).flip(dim)
    most = torch.where(exact, least, (~reached).float())
    return torch.cat([least, most], 1)


def _spread(reached: Tensor, free: Tensor, dim: int) -> Tensor:
    """Cells of which the last one before them along a dimension that is not free is behind one that is reached."""
    place = torch.arange(1, free.shape[dim] + 1, device=free.device)
    place = place if dim == -1 else place[:, None]
    return free & ((place * reached).cummax(dim).values > (place * ~free).cummax(dim).values)


def opacity_loss(opacity: Tensor, coverage: Tensor) -> Tensor:
    """Mean squared distance of opacities [B, h, w] to the bounds [B, 2, h, w] of their coverage (a scalar); bounds may
    be uint8, in units of 1/255."""
    least, most = (coverage / 255 if coverage.dtype == torch.uint8 else coverage).unbind(1)
    return ((least - opacity).clamp(min=0) + (opacity - most).clamp(min=0)).square().mean()
