"""Headway: an LLM inference engine in which the urgent request goes next."""

__version__ = "0.1.0"
