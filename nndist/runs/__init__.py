"""What a run keeps in its folder: checkpoints, states, records, figures of W&B; written and read again."""
