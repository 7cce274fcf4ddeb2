"""DeiT-Ti+ on ImageNet, 300 epochs; the paper's top-1 (top-5): 75.9 (93.2)."""

from configs import default


def get_config():
    return default.get_config("deit_tiny_plus")
