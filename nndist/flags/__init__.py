"""From a command line to a recipe and a run's settings."""
