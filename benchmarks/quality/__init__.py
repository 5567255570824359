"""The quality lab: a small trained model, a suite of tasks, and every policy in the same engine."""
