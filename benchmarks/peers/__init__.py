"""What ``peers.py`` measures: an engine's script runs in that engine's own environment."""
