"""Families of which no instance can be made, or run, here: most need code from the hub."""

from __future__ import annotations

from tests.families.family import Family

REMOTE = "its configuration is code beside the weights on the hub"

UNBUILT = [
    Family(
        name="InternVL 3.5, chat format",
        architecture="InternVLChatModel",
        unbuilt=f"{REMOTE}; the same models in Transformers' format are above",
    ),
    Family(name="Ovis 2.5", architecture="Ovis2_5", unbuilt=REMOTE),
    Family(name="MiniCPM-V 4.5", architecture="MiniCPMV", unbuilt=REMOTE),
    Family(
        name="LLaVA-OneVision 2",
        architecture="LlavaOnevision2ForConditionalGeneration",
        unbuilt="its processor is code beside the weights on the hub",
    ),
    Family(
        name="Keye-VL 1.5",
        architecture="KeyeVL1_5ForConditionalGeneration",
        unbuilt=REMOTE,
    ),
    Family(name="Phi-4-multimodal", architecture="Phi4MMForCausalLM", unbuilt=REMOTE),
    Family(
        name="ERNIE-4.5-VL",
        architecture="Ernie4_5_VLMoeForConditionalGeneration",
        unbuilt="vLLM's class reads the configuration that the code on the hub makes, with two "
        "numbers of experts; Transformers' class takes one",
    ),
    Family(
        name="HunyuanOCR",
        architecture="HunYuanVLForConditionalGeneration",
        unbuilt="vLLM itself does not run it on a CPU, where its linear layers ask for contiguous "
        "inputs",
    ),
    Family(
        name="Molmo 2",
        architecture="Molmo2ForConditionalGeneration",
        unbuilt=f"{REMOTE}, and so is its processor; pictures attend both ways",
    ),
    Family(name="dots.ocr", architecture="DotsOCRForCausalLM", unbuilt=REMOTE),
    Family(
        name="SmolVLM",
        architecture="SmolVLMForConditionalGeneration",
        unbuilt="its processor needs the package num2words, which vLLM does not; "
        "the class is that of Idefics3 with another processor",
    ),
    Family(
        name="DeepSeek-OCR",
        architecture="DeepseekOCRForCausalLM",
        unbuilt="vLLM's class has a vision tower of 400 million parameters, whatever the "
        "configuration says",
    ),
]
