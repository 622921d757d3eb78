"""Small configurations of every task, with the bundled vocabulary, for tests of commands and of training."""

from madtp import CaptionConfig, NLVRConfig, RetrievalConfig, VQAConfig
from madtp.config import CLIPConfig, CLIPTextConfig, TextConfig, VisionConfig


def configs(image_size, depth, layers=2, sd_num=12, mlp_ratio=2, positions=64):
    """By task: vision towers of this size and depth, text stacks of so many layers."""
    sizes = dict(
        image_size=image_size, patch_size=8, embed_dim=32, depth=depth, num_heads=2, mlp_ratio=mlp_ratio, sd_num=sd_num,
        sd_dim=32,
    )  # fmt: skip
    vision = VisionConfig(**sizes)
    # [SEP] is the fourth entry of the vocabulary.
    text = TextConfig(
        32, layers, 2, 64, vocab_size=200, max_position_embeddings=positions, encoder_width=32, sep_token_id=3
    )
    return {
        "nlvr": NLVRConfig(vision, text, merge_from=1),
        "caption": CaptionConfig(vision, text),
        "vqa": VQAConfig(vision, text),
        "retrieval": RetrievalConfig(vision, text, proj_dim=16),
        "clip": CLIPConfig(
            VisionConfig(**sizes, map_func=True), CLIPTextConfig(32, layers, 2, 64, vocab_size=514), embed_dim=16
        ),
    }


CONFIGS = configs(48, depth=3)
