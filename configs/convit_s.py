"""ConViT-S on ImageNet, 300 epochs; the paper's top-1 (top-5): 81.3 (95.7)."""

from configs import default


def get_config():
    return default.get_config("convit_small")
