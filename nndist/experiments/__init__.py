"""Many runs: sweeps, comparisons, the documents' figures, learning-rate and batch-size finders, `verify`."""
