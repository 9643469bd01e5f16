# SPDX-License-Identifier: Apache-2.0
from .format import CONFIG as CONFIG
from .format import LEARNING_RATES as LEARNING_RATES
from .format import Progress as Progress
from .format import folder_of as folder_of
from .format import is_complete as is_complete
from .format import list_complete as list_complete
from .format import set_aside as set_aside
from .load import Checkpoint as Checkpoint
from .load import DamagedCheckpoint as DamagedCheckpoint
from .load import load_checkpoint as load_checkpoint
from .save import CheckpointWriter as CheckpointWriter
from .waves import WaveCheckpoint as WaveCheckpoint
