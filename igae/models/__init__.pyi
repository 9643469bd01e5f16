# SPDX-License-Identifier: Apache-2.0
from .autoencoder import Autoencoder as Autoencoder
from .autoencoder import load_autoencoder as load_autoencoder
from .config import AutoencoderConfig as AutoencoderConfig
from .config import LossWeights as LossWeights
from .igae import IGAE as IGAE
from .igae import Views as Views
from .igae import to_signed as to_signed
from .lpips import LPIPS as LPIPS
