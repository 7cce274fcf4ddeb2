"""ConViT-B+ on ImageNet, 300 epochs; the paper's top-1 (top-5): 82.5 (95.9)."""

from configs import default


def get_config():
    return default.get_config("convit_base_plus")
