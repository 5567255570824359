"""The command `vllm-budgetkv`: what a quota buys, and whether an installation works."""
