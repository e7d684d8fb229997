"""Environments that any policy can play: rollouts, prompts with a scorer, scripted play."""
