"""What vLLM calls in a worker: backend, metadata, attention, the worker itself."""
