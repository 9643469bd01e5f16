# SPDX-License-Identifier: Apache-2.0
from . import tensors as tensors
from .paths import join as join
from .reading import File as File
from .reading import Missing as Missing
from .reading import StoreError as StoreError
from .reading import file_system as file_system
from .reading import read_whole as read_whole
from .tensors import Stamp as Stamp
from .tensors import TensorFile as TensorFile
from .writing import staged as staged
from .writing import write_text as write_text
