# SPDX-License-Identifier: Apache-2.0
from .layout import CONFIG as CONFIG
from .layout import FORMAT as FORMAT
from .layout import RATES as RATES
from .layout import Progress as Progress
from .layout import folder_of as folder_of
from .layout import is_complete as is_complete
from .layout import list_complete as list_complete
from .layout import reason as reason
from .parts import Parts as Parts
from .reader import Loaded as Loaded
from .reader import load as load
from .reader import settings as settings
from .writer import Writer as Writer
