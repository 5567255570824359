"""What a worker holds under quotas; knows no vLLM."""
