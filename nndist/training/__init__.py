"""One run: the loop, the step, evaluations, and how it starts, is saved and resumes. Read trainer.py, then step.py."""
