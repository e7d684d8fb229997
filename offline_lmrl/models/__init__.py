"""Models: causal LMs with value heads beside the LM head, reward models, and actor-critics; import them by module."""
