# SPDX-License-Identifier: Apache-2.0
"""Settings of the renderer."""

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

SHORTEST, LONGEST = 1e-6, 1e6
"""Lengths that float32 has differences and squares of."""
MOST_SAMPLES = 4096


@dataclass(frozen=True)
class RenderOptions:
    """How rays are sampled and planes are read. Lengths are in the units of the cameras' positions.

    Raises ValueError when a value, or a combination of them, is impossible.
    """

    near: float | Literal["auto"] = "auto"
    """Distance from the camera to the first sample; "auto" (then far too): where the ray enters the box."""
    far: float | Literal["auto"] = "auto"
    """Distance from the camera to the end of the samples; "auto": where the ray leaves the box."""
    box: float = 1.0
    """Side of the cube around the origin that the planes cover."""
    coarse_samples: int = 48
    """Stratified samples on each ray, at least 2."""
    fine_samples: int = 48
    """Further samples on each ray, placed by importance; may be 0."""
    rays_per_pixel: int = 1
    """S, from 1 to 8: a pixel is the mean of S x S rays through its area; of 1 the ray goes through its middle."""
    spacing: Literal["depth", "disparity"] = "depth"
    """Coarse samples are uniform in distance, or in its inverse."""
    field: str = "mlp"
    """Network that makes density and color of features: the decoding MLP, or one that an installed package has as an
    entry point of `igae.fields`."""
    patch: int = 1
    """Pixels along a side of the patch that becomes one latent pixel (`igae.models.PatchHead`); it divides the
    autoencoder's downscale factor."""
    axes: Literal["orthogonal", "eg3d"] = "orthogonal"
    """Axes of the three planes: (x,y) (x,z) (y,z), or (x,y) (x,z) (z,x) as in the published weights."""
    reduce: Literal["sum", "product"] = "sum"
    """How the features of the three planes become one."""

    precision: Literal["fp32", "fp16"] = "fp16"
    """Of the CUDA kernels' matrix products; fp16 rounds their operands to 11 bits, and those above 65504 to that. Sums
    are fp32 in both, and so is all of it where planes are multiplied. The torch backend ignores it."""
    deterministic: bool = False
    """Whether the CUDA kernels' gradients are the same bits each time, which is slower.
    `torch.use_deterministic_algorithms` asks for the same."""

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for field in fields(self):
            value, known = getattr(self, field.name), get_args(field.type)
            if get_origin(field.type) is Literal and value not in known:
                raise ValueError(f"{field.name} is {value!r}; it must be one of {', '.join(known)}")
        if not SHORTEST <= self.box <= LONGEST:
            raise ValueError(f"box is {self.box}; the side of the cube must be positive, {SHORTEST:g} to {LONGEST:g}")
        if not 2 <= self.coarse_samples <= MOST_SAMPLES:
            raise ValueError(f"coarse_samples is {self.coarse_samples}; a ray takes 2 to {MOST_SAMPLES} samples")
        if not 0 <= self.fine_samples <= MOST_SAMPLES:
            raise ValueError(f"fine_samples is {self.fine_samples}; it must be from 0 to {MOST_SAMPLES}")
        if not 1 <= self.patch <= 16:
            raise ValueError(f"patch is {self.patch}; it must be from 1 to 16")
        if not 1 <= self.rays_per_pixel <= 8:
            raise ValueError(f"rays_per_pixel is {self.rays_per_pixel}; it must be from 1 to 8")
        if isinstance(self.near, str) or isinstance(self.far, str):
            if self.near != "auto" or self.far != "auto":
                raise ValueError(f"near is {self.near!r} and far is {self.far!r}; give two numbers or 'auto' twice")
        elif not (0 <= self.near < self.far <= LONGEST and self.far >= SHORTEST):
            raise ValueError(
                f"near is {self.near} and far is {self.far}; 0 <= near < far must hold, and far be {SHORTEST:g} to "
                f"{LONGEST:g}"
            )
        elif self.spacing == "disparity" and self.near < SHORTEST:
            raise ValueError(f"near is {self.near}; spacing in disparity needs a positive near, at least {SHORTEST:g}")
