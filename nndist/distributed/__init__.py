"""Processes: their devices, collectives, and the parts of networks that depend on them."""
