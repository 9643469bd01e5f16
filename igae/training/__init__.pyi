# SPDX-License-Identifier: Apache-2.0
from .fit import Fit as Fit
from .parallel.all_reduce import BucketedAllReduce as BucketedAllReduce
from .parallel.ddp import DDP as DDP
from .parallel.engine import Engine as Engine
from .parallel.strategy import Strategy as Strategy
from .preflight import check_memory as check_memory
from .recipe import Recipe as Recipe
from .shares import waves as waves
from .trainer import Trainer as Trainer
