"""The engine: the step loop, and the ways to call it."""
