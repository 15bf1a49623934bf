"""Parses a command line into a recipe and a run's settings."""
