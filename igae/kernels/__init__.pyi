# SPDX-License-Identifier: Apache-2.0
from .compile import ARCHITECTURES as ARCHITECTURES
from .compile import Usage as Usage
from .compile import cached_cubin as cached_cubin
from .compile import compile_source as compile_source
from .launch import INSTALLED as INSTALLED
from .launch import LIBRARIES as LIBRARIES
from .launch import Library as Library
from .launch import pointer as pointer
from .launch import unavailable as unavailable
