"""Whole neural-mass simulations, and their whole gradients, as one kernel each.

The public names, listed in ``__init__.pyi``, are imported when they are first used.
"""

import lazy_loader

from . import _program as _program

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
