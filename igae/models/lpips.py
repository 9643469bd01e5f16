# SPDX-License-Identifier: Apache-2.0
"""LPIPS, the perceptual distance of two images."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igae.models import fused

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"


class LPIPS(nn.Module):
    """Learned perceptual distance of two images on VGG16 features (Zhang et al., CVPR 2018, version 0.1).

    d(x, y) = sum over five layers of the spatial mean of sum_c w_c (f_c(x) - f_c(y))^2, where f is the layer's output
    divided by its norm over channels. The weights w come with torchmetrics.

    Args:
        weights: path of torchvision's ``vgg16-397923af.pth``, which is fetched once into torch's hub cache if left out.

    Raises:
        ValueError: the weights are neither given nor can be fetched, or don't belong to a VGG16.
    """

    # Output channels of the convolutions; "M" halves the resolution. Features are taken before each "M" and at the end.
    LAYOUT: tuple[int | str, ...] = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)

    SMALLEST = 16
    """Pixels that the shorter side of an image must have."""

    shift: Tensor
    scale: Tensor

    kernels = False

    def __deepcopy__(self, _: object) -> "LPIPS":
        return self  # it never changes: copies of a model share it

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        layers, channels = list[nn.Module](), 3
        for entry in self.LAYOUT:
            if isinstance(entry, int):
                layers += [nn.Conv2d(channels, entry, 3, padding=1), nn.ReLU()]
                channels = entry
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)  # with torchvision's names
        given, own = _read_vgg(weights), self.state_dict()
        wrong = [name for name, value in own.items() if getattr(given.get(name), "shape", None) != value.shape]
        if wrong:
            source = weights or VGG16_URL
            raise ValueError(f"train.lpips_weights: {source} is no VGG16 ({wrong[0]} is missing or misshaped)")
        self.load_state_dict({name: given[name] for name in own})
        path = files("torchmetrics") / "functional/image/lpips_models/vgg.pth"
        heads = torch.load(str(path), map_location="cpu", weights_only=True)
        for level in range(5):
            self.register_buffer(f"head{level}", heads[f"lin{level}.model.1.weight"].flatten())
        # Statistics of ImageNet images in [0, 1], expressed for images in [-1, 1].
        self.register_buffer("shift", 2.0 * torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1) - 1.0)
        self.register_buffer("scale", 2.0 * torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.requires_grad_(False)

    @staticmethod
    def is_there(weights: str | Path | None = None) -> bool:
        """Whether VGG16's weights can be read without fetching them."""
        cached = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_URL.rpartition("/")[2]
        return Path(weights or cached).is_file()

    def speed_up(self, dtype: torch.dtype) -> None:
        """Have the weights in the dtype that autocast would make of them each time, channels last in memory, and CUDA
        kernels compute what they can. Targets get no gradient then."""
        features: Any = self.features
        features.to(dtype=dtype, memory_format=torch.channels_last)
        self.kernels = True

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean distance (a scalar) of images [B, 3, H, W] in [-1, 1]; H and W at least SMALLEST."""
        return self.distances(prediction, target).mean()

    def distances(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Distance of each image: [B]."""
        x, y = (prediction - self.shift) / self.scale, (target - self.shift) / self.scale
        total, level = prediction.new_zeros(len(prediction), dtype=torch.float32), 0
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                total, level = total + self._distance(x, y, level), level + 1
            x, y = self._after(x, layer), self._after(y, layer)
        return total + self._distance(x, y, level)

    def _after(self, x: Tensor, layer: nn.Module) -> Tensor:
        if not (self.kernels and x.is_cuda) or isinstance(layer, nn.MaxPool2d):
            y: Tensor = layer(x)
            return y
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            return fused.rectified_convolution(x, layer.weight, layer.bias)
        return x  # it is rectified

    def _distance(self, x: Tensor, y: Tensor, level: int) -> Tensor:
        if self.kernels and fused.fits(x, x.shape[1]):
            return fused.feature_distance(x, y, getattr(self, f"head{level}"))
        difference = (F.normalize(x.float(), dim=1, eps=1e-10) - F.normalize(y.float(), dim=1, eps=1e-10)).square()
        return torch.einsum("bchw,c->bhw", difference, getattr(self, f"head{level}")).mean((1, 2))


def _read_vgg(weights: str | Path | None) -> dict[str, Tensor]:
    if weights is None:
        try:
            state = torch.hub.load_state_dict_from_url(VGG16_URL, map_location="cpu", weights_only=True)
        except OSError as error:
            raise ValueError(
                f"the LPIPS loss needs VGG16's weights and {VGG16_URL} can't be fetched ({error}): download it "
                "elsewhere and set train.lpips_weights to its path, or set the stage's weight natural_lpips to 0"
            ) from error
    else:
        if not Path(weights).is_file():
            raise ValueError(f"train.lpips_weights: there is no file {weights}")
        try:
            state = torch.load(str(weights), map_location="cpu", weights_only=True)
        except Exception as error:  # whatever unpickling meets in a file that is something else
            raise ValueError(f"train.lpips_weights: {weights} can't be read ({type(error).__name__})") from error
    return state if isinstance(state, dict) else {}
