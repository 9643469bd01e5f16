# SPDX-License-Identifier: Apache-2.0
from .report.page import try_to_write as try_to_write
from .report.page import write_report as write_report
from .server import Viewer as Viewer
from .subject import Followed as Followed
