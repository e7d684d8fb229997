"""Raw logs to scored trajectories on disk, one module per public format or scripted game."""
