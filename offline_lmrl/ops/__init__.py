"""Pure functions of tensors: returns, value learning, policy gradients, preferences, chunked sums, decoding.

The modules need only torch and the standard library.
"""
