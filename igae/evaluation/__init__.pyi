# SPDX-License-Identifier: Apache-2.0
from . import pictures as pictures
from .config import EvaluationConfig as EvaluationConfig
from .evaluator import FIGURES as FIGURES
from .evaluator import Evaluator as Evaluator
from .evaluator import spread as spread
from .pictures import Picture as Picture
from .pictures import depth_to_rgb as depth_to_rgb
from .pictures import latent_to_rgb as latent_to_rgb
from .pictures import to_uint8 as to_uint8
from .pictures import write_video as write_video
