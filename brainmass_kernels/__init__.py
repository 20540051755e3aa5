"""Whole neural-mass simulations, and their whole gradients, as one kernel each."""

from . import testing as testing
from .backends.base import Unsupported as Unsupported
from .dispatch import Plan as Plan
from .dispatch import implementations as implementations
from .fit import Fit as Fit
from .fit import fit as fit
from .functional import bounded_input as bounded_input
from .functional import process_sequence as process_sequence
from .functional import sigmoid as sigmoid
from .functional import sys2nd as sys2nd
from .fused import sigmoid_sys2nd as sigmoid_sys2nd
from .models import Block as Block
from .models import JansenRit as JansenRit
from .models import Model as Model
from .models import SecondOrderModel as SecondOrderModel
from .models import model as model
from .pointwise import NotPointwise as NotPointwise
from .simulate import Result as Result
from .simulate import explain as explain
from .simulate import simulate as simulate

__version__ = "0.1.0"
