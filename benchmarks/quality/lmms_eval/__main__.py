"""lmms-eval with one more model, `vllm_video`: `python -m benchmarks.quality.lmms_eval --model ...`

Every argument is lmms-eval's.
"""

from lmms_eval.cli.dispatch import main
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelManifest

if __name__ == "__main__":
    video_model = "benchmarks.quality.lmms_eval.video_model.VideoModel"
    MODEL_REGISTRY_V2.register_manifest(ModelManifest("vllm_video", chat_class_path=video_model))
    main()
