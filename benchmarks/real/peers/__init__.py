"""The peers that run on a CPU: the same weights and prompts, in environments of their own.

kvpress (https://github.com/NVIDIA/kvpress) compresses the cache of transformers behind a prefill in
one piece. OpenVINO GenAI (https://github.com/openvinotoolkit/openvino.genai) evicts blocks of 32
tokens while it decodes; its limit holds from the first decoded token on, and not in prefill.
"""
