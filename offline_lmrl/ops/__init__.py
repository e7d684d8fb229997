"""Pure functions of tensors: returns, value learning, chunked sums, decoding. Nothing here needs more than torch."""
