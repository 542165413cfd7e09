"""The scheduling core: standard library only; no clock, no I/O, no threads, no randomness."""
