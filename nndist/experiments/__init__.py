"""Many runs: sweeps, comparisons, the documents' figures, finders of a rate and a batch size, the promises' test."""
