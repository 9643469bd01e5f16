# SPDX-License-Identifier: Apache-2.0
"""What a model is measured with and what one looks at."""
