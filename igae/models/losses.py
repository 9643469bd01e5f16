# SPDX-License-Identifier: Apache-2.0
"""Loss terms and the perceptual distance, as pure functions of tensors."""

from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"


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


class LPIPS(nn.Module):
    """Learned perceptual distance of two images on VGG16 features (Zhang et al., CVPR 2018, version 0.1).

    d(x, y) = sum over five layers of the spatial mean of sum_c w_c (f_c(x) - f_c(y))^2, where f is the layer's output
    divided by its norm over channels. The 1 x 1 weights w come with torchmetrics; VGG16's weights are torchvision's
    ``vgg16-397923af.pth``, read from ``weights`` or fetched once into torch's hub cache.

    Args:
        weights: path of a VGG16 state dict with the keys ``features.N.weight`` and ``features.N.bias``.

    Raises:
        ValueError: the weights are neither given nor can be fetched, or don't belong to a VGG16.
    """

    # Output channels of the 13 convolutions; "M" halves the resolution. Features are taken before each "M".
    LAYOUT: tuple[int | str, ...] = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)

    shift: Tensor
    scale: Tensor

    def __deepcopy__(self, _: object) -> "LPIPS":
        return self  # it never changes: copies of a model share it

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        names: list[str] = []
        modules: list[nn.Module] = []
        index, channels = 0, 3
        for entry in self.LAYOUT:
            if entry == "M":
                self.stages.append(nn.Sequential(*modules))
                modules = [nn.MaxPool2d(2)]
                index += 1
            else:
                assert isinstance(entry, int)
                modules += [nn.Conv2d(channels, entry, 3, padding=1), nn.ReLU()]
                names.append(f"features.{index}")
                index, channels = index + 2, entry
        self.stages.append(nn.Sequential(*modules))
        self._load_vgg(self._read_vgg(weights), names, str(weights or VGG16_URL))
        heads = torch.load(
            str(files("torchmetrics") / "functional/image/lpips_models/vgg.pth"), map_location="cpu", weights_only=True
        )
        for level in range(len(self.stages)):
            self.register_buffer(f"head{level}", heads[f"lin{level}.model.1.weight"].flatten())
        # Statistics of ImageNet images in [0, 1], expressed for images in [-1, 1].
        self.register_buffer("shift", 2.0 * torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1) - 1.0)
        self.register_buffer("scale", 2.0 * torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.requires_grad_(False)

    @staticmethod
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

    def _load_vgg(self, state: dict[str, Tensor], names: list[str], source: str) -> None:
        convolutions = [m for m in self.modules() if isinstance(m, nn.Conv2d)]
        for name, convolution in zip(names, convolutions, strict=True):
            for part, own in convolution.named_parameters():
                given = state.get(f"{name}.{part}")
                if not isinstance(given, Tensor) or given.shape != own.shape:
                    raise ValueError(
                        f"train.lpips_weights: {source} is no VGG16 ({name}.{part} is missing or misshaped)"
                    )
                own.data.copy_(given)

    @staticmethod
    def is_there(weights: str | Path | None = None) -> bool:
        """Whether VGG16's weights can be read without fetching them."""
        cached = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_URL.rpartition("/")[2]
        return Path(weights or cached).is_file()

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean distance (a scalar) of images [B, 3, H, W] in [-1, 1]; H and W at least 16."""
        return self.distances(prediction, target).mean()

    def distances(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Distance of each image: [B]."""
        x = (prediction - self.shift) / self.scale
        y = (target - self.shift) / self.scale
        total = prediction.new_zeros(len(prediction), dtype=torch.float32)
        for level, stage in enumerate(self.stages):
            x, y = stage(x), stage(y)
            difference = (F.normalize(x.float(), dim=1, eps=1e-10) - F.normalize(y.float(), dim=1, eps=1e-10)).square()
            total = total + torch.einsum("bchw,c->bhw", difference, getattr(self, f"head{level}")).mean((1, 2))
        return total
