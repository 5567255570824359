"""What `benchmarks.soak` is made of: its clients, what they send, and how memory is judged."""
