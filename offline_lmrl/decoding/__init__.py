"""Decoding: the sampler, the policies built on it, planning, scorers, reranking and relabelling."""
