"""Processes: which device each has, what they add up together, how a network is split."""
