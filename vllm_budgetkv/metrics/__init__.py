"""What a server counts of its requests, for Prometheus and `LLM.get_metrics()`; knows no vLLM."""
