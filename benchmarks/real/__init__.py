"""What budgets cost on a pretrained language model: tasks, instruments and peers."""
