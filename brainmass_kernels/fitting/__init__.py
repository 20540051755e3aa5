"""Fits of parameters: the call, its result and file, targets, problem, starts and steps."""
