# SPDX-License-Identifier: Apache-2.0
from .report import write_report as write_report
from .server import Viewer as Viewer
from .subject import Followed as Followed
