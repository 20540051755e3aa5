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
from .models import HORN as HORN
from .models import Block as Block
from .models import CoombesByrne as CoombesByrne
from .models import Epileptor as Epileptor
from .models import FitzHughNagumo as FitzHughNagumo
from .models import Generic2dOscillator as Generic2dOscillator
from .models import Hopf as Hopf
from .models import JansenRit as JansenRit
from .models import LarterBreakspear as LarterBreakspear
from .models import Linear as Linear
from .models import Lorenz as Lorenz
from .models import Model as Model
from .models import MontbrioPazoRoxin as MontbrioPazoRoxin
from .models import SecondOrderModel as SecondOrderModel
from .models import StuartLandau as StuartLandau
from .models import VanDerPol as VanDerPol
from .models import WilsonCowan as WilsonCowan
from .models import WilsonCowanAdaptive as WilsonCowanAdaptive
from .models import WilsonCowanDivisive as WilsonCowanDivisive
from .models import WilsonCowanDivisiveInput as WilsonCowanDivisiveInput
from .models import WilsonCowanLinear as WilsonCowanLinear
from .models import WilsonCowanNoSaturation as WilsonCowanNoSaturation
from .models import WilsonCowanSimplified as WilsonCowanSimplified
from .models import WilsonCowanSymmetric as WilsonCowanSymmetric
from .models import WilsonCowanThreePopulation as WilsonCowanThreePopulation
from .models import WongWang as WongWang
from .models import WongWangExcInh as WongWangExcInh
from .models import list_models as list_models
from .models import model as model
from .pointwise import NotPointwise as NotPointwise
from .simulate import Result as Result
from .simulate import explain as explain
from .simulate import simulate as simulate

__version__ = "0.1.0"
