"""DeiT-S+ on ImageNet, 300 epochs; the paper's top-1 (top-5): 79.0 (94.4)."""

from configs import default


def get_config():
    return default.get_config("deit_small_plus")
