"""lmms-eval's `vllm_generate`, with what vLLM 0.32 wants to know of a video."""

from __future__ import annotations

from typing import Any

from lmms_eval.models.chat.vllm_generate import VLLMGenerate


class VideoModel(VLLMGenerate):
    """Gives videos to vLLM as videos, each with its metadata.

    lmms-eval 0.7.3 passes metadata for Qwen3-VL alone; for Qwen2.5-VL, vLLM 0.32 then refuses the
    request: "Video metadata is required but not found in mm input".
    """

    def make_one_request(self, request: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The prompt, its media and the sampling parameters of a request."""
        inputs, params = super().make_one_request(request)
        videos = inputs["multi_modal_data"].get("video")
        if videos:
            fps = inputs["mm_processor_kwargs"]["fps"]
            inputs["multi_modal_data"]["video"] = [
                video if isinstance(video, tuple) else (video, metadata_of(len(video), fps))
                for video in videos
            ]
        return inputs, params


def metadata_of(num_frames: int, fps: float) -> dict[str, Any]:
    """Metadata of frames that were sampled already: a video of its own, every frame of it."""
    return {
        "fps": fps,
        "total_num_frames": num_frames,
        "frames_indices": list(range(num_frames)),
        "do_sample_frames": False,
    }
