"""Pure functions of tensors: returns, value learning, policy gradients, preferences, chunked sums, decoding.

Nothing here needs more than torch.
"""
