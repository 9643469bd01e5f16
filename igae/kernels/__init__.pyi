# SPDX-License-Identifier: Apache-2.0
from .compile import Usage as Usage
from .compile import compile_source as compile_source
from .compile import source_cubin as source_cubin
from .launch import Library as Library
from .launch import architecture as architecture
from .launch import pointer as pointer
from .launch import unavailable as unavailable
