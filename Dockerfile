# The public vLLM server image with this plugin in it; the entry point stays `vllm serve`.
#
#   docker build -t vllm-budgetkv .
#   docker run --gpus all -p 8000:8000 vllm-budgetkv MODEL
#
# No GPU has run the Triton kernels yet: there `--kv-policy` is refused at start without
# `--kv-unproven-device`, and without a policy the server is stock vLLM. Build with `--build-arg BASE=` a CPU image of vLLM (0.32 or
# 0.33) to use a policy.
ARG BASE=vllm/vllm-openai:v0.32.0

FROM ${BASE} AS wheel
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE CHANGELOG.md CITATION.cff ./
COPY csrc csrc
COPY vllm_budgetkv vllm_budgetkv
# against the torch of the image, hence no build isolation; no dependency is touched in either stage
RUN python3 -m pip install --no-cache-dir "setuptools>=77,<81" "wheel>=0.45" "ninja>=1.11" \
 && python3 -m pip wheel . --no-build-isolation --no-deps --wheel-dir /wheels

FROM ${BASE}
COPY --from=wheel /wheels /wheels
RUN python3 -m pip install --no-cache-dir --no-deps /wheels/*.whl && rm -r /wheels
