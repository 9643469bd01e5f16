# SPDX-License-Identifier: Apache-2.0
"""A run as one HTML file that needs nothing else: no network, no other file."""

from igae.viewer.report.page import write_report

__all__ = ["write_report"]
