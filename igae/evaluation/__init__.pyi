# SPDX-License-Identifier: Apache-2.0
from .config import EvaluationConfig as EvaluationConfig
from .evaluator import Evaluator as Evaluator
from .evaluator import spread as spread
from .metrics import METRICS as METRICS
from .metrics import current_name as current_name
from .metrics import problems as problems
from .metrics import psnr as psnr
from .pictures import Picture as Picture
from .pictures import channels_to_gray as channels_to_gray
from .pictures import depth_to_rgb as depth_to_rgb
from .pictures import grid as grid
from .pictures import latent_to_rgb as latent_to_rgb
from .pictures import save_png as save_png
from .pictures import to_uint8 as to_uint8
from .pictures import write_video as write_video
