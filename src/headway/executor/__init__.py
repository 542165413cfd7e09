"""Executors: what runs a scheduled step."""
