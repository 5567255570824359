"""What the user asked for: options, flags, checks, refusals, and how vLLM is told."""
