# SPDX-License-Identifier: Apache-2.0
from .augmentation import NUMBERS as NUMBERS
from .augmentation import augment as augment
from .augmentation import augment_numbers as augment_numbers
from .autoencoder import Autoencoder as Autoencoder
from .autoencoder import load_autoencoder as load_autoencoder
from .config import AugmentConfig as AugmentConfig
from .config import AutoencoderConfig as AutoencoderConfig
from .config import LossWeights as LossWeights
from .fused import KERNELS as KERNELS
from .head import PatchHead as PatchHead
from .igae import IGAE as IGAE
from .importing import import_diffusers as import_diffusers
from .losses import LossInputs as LossInputs
from .losses import coverage_bounds as coverage_bounds
from .lpips import LPIPS as LPIPS
from .views import Views as Views
from .views import to_signed as to_signed
