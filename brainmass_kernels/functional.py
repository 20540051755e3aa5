import jax
def sigmoid(x, vmax=1.0, v0=0.0, r=1.0):
    return vmax*jax.lax.logistic(r*(x-v0))
def sys2nd(A,a,u,x,v):
    return A*a*u-2*a*v-a**2*x
process_sequence=None
import jax.numpy as jnp
def bounded_input(x,bound=500.0): return bound*jnp.tanh(x/bound)
