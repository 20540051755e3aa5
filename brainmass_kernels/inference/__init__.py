from . import likelihoods as likelihoods
from . import priors as priors
