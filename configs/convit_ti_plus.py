"""ConViT-Ti+ on ImageNet, 300 epochs; the paper's top-1 (top-5): 76.7 (93.6)."""

from configs import default


def get_config():
    return default.get_config("convit_tiny_plus")
