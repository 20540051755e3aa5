"""Fits of parameters: the call, what it returns, its file, its targets, its problem and its steps."""
