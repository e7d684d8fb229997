"""The guided model: a causal LM class with value heads beside its LM head; import the modules by name."""
