"""What we touch in vLLM so that videos are computed in groups of frames; rows of `upstream.py`."""

from __future__ import annotations

from vllm_budgetkv.start.touchpoint import Touchpoint

_BUDGET = "vllm.multimodal.encoder_budget"
_INPUTS = "vllm.multimodal.inputs"
_MODELS = "vllm.model_executor.models.interfaces"
_UTILS = "vllm.multimodal.utils"

# fmt: off
FRAME_TOUCHPOINTS = (
    Touchpoint(_INPUTS, "MultiModalFeatureSpec", "subclass", "a group of frames is an item"),
    Touchpoint("vllm.v1.core.sched.output", "SchedulerOutput", "subclass",
               "a step brings pixels that an earlier one left out"),
    Touchpoint(_MODELS, "SupportsMRoPE.get_mrope_input_positions", "replace",
               "positions follow from whole videos",
               ("self", "input_tokens", "mm_features")),
    Touchpoint(_BUDGET, "MultiModalBudget.get_dummy_encoder_profile_inputs", "replace",
               "the memory trial runs the tower on groups",
               ("self", "modality", "max_items_per_batch")),
    Touchpoint("vllm.v1.worker.gpu.model_runner", "MultiModalBudget", "replace",
               "the trial of runner V2 asks for bounded counts"),
    Touchpoint("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.profile_run", "read",
               "makes its counts by that name",
               ("self", "randomize_inputs")),
    Touchpoint("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.profile_run", "read",
               "runner V1: asks its `mm_budget`",
               ("self", "randomize_inputs")),
    Touchpoint(_MODELS, "SupportsMultiModal.embed_multimodal", "replace",
               "the proof: a video at once, and in groups; no item keeps its batch alive",
               ("self", "kwargs")),
    Touchpoint(_UTILS, "group_and_batch_mm_kwargs", "read", "the same, batched as runners do",
               ("mm_kwargs", "device", "pin_memory")),
    Touchpoint(_UTILS, "strip_covered_mm_data", "read",
               "drops data of covered groups, keeps their class",
               ("mm_features", "num_computed_tokens", "uses_mrope")),
    Touchpoint(_UTILS, "get_mm_features_in_window", "read", "groups stand by offset",
               ("mm_features", "start", "end")),
    Touchpoint("vllm.v1.core.encoder_cache_manager", "EncoderCacheManager.create_manager", "read",
               "a cache that keeps what groups need",
               ("cls", "cache_size", "vllm_config")),
    Touchpoint("vllm.v1.core.sched.scheduler", "Scheduler._free_encoder_inputs", "read",
               "a group is free behind its last token",
               ("self", "request")),
)
# fmt: on
