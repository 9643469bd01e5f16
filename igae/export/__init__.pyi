# SPDX-License-Identifier: Apache-2.0
from .model import Content as Content
from .model import Scene as Scene
from .model import Trained as Trained
from .published import architecture as architecture
from .published import read_published as read_published
from .published import read_settings as read_settings
from .reader import Export as Export
from .reader import is_export as is_export
from .reader import load_model as load_model
from .trained import SECTIONS as SECTIONS
from .trained import data_root as data_root
from .trained import find_model as find_model
from .trained import load_trained as load_trained
from .trained import read_run as read_run
from .trained import take_settings as take_settings
from .writer import check_target as check_target
from .writer import write as write
