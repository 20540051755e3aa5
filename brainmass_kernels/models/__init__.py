"""The models, one file each."""

from .base import Block as Block
from .base import Model as Model
from .base import SecondOrderModel as SecondOrderModel
from .base import model as model
from .jansen_rit import JansenRit as JansenRit
