"""Use trained runs: load a run's folder, predict, evaluate by class, and export networks."""
