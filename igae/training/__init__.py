# SPDX-License-Identifier: Apache-2.0
"""Training: recipes, steps, stages, runs."""
