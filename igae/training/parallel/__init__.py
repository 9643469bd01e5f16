# SPDX-License-Identifier: Apache-2.0
"""How the module that ranks share is trained: Accelerate, DDP, FSDP2, DeepSpeed."""
