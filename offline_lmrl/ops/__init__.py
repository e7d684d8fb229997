"""Pure functions of tensors: returns, value learning, masking, decoding. Nothing here needs more than torch."""
