"""What the model calls: the attention backend, its metadata and its forward."""
