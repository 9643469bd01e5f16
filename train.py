# SPDX-License-Identifier: Apache-2.0
"""Train an IG-AE: ``accelerate launch train.py --config igae.yaml data.root=SHARDS [key=value ...]``."""

from igae.cli.train import main
from igae.errors import end

if __name__ == "__main__":
    end(main())
