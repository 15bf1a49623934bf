"""Networks in use: a run's folder loaded, its scores by class, its networks exported."""
