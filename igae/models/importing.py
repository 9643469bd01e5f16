# SPDX-License-Identifier: Apache-2.0
"""The import of diffusers, which is most of a command's start."""

import sys


def import_diffusers() -> None:
    """Import diffusers as where SciPy and transformers are not installed: else it imports both, which takes 3 s more.

    Its autoencoders need neither. Its pipelines do, and miss them in this process from then on, so that this is for
    commands and not for a library. Both can be imported as ever.
    """
    hidden = [name for name in ("scipy", "transformers") if name not in sys.modules and "diffusers" not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        import diffusers.models.modeling_utils  # noqa: F401  # it and what it imports look for them, once
    finally:
        for name in hidden:
            del sys.modules[name]
