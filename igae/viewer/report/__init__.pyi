# SPDX-License-Identifier: Apache-2.0
from . import curves as curves
from . import media as media
from .page import scene_table as scene_table
from .page import try_to_write as try_to_write
from .page import write_report as write_report
from .run import LoggedStep as LoggedStep
from .run import read_run as read_run
