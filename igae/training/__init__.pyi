# SPDX-License-Identifier: Apache-2.0
from .fit import Fit as Fit
from .parallel.engine import Engine as Engine
from .preflight import check_memory as check_memory
from .recipe import Recipe as Recipe
from .shares import waves as waves
from .trainer import Trainer as Trainer
