"""DeiT-B+ on ImageNet, 300 epochs; the paper's top-1 (top-5): 77.5 (93.5)."""

from configs import default


def get_config():
    return default.get_config("deit_base_plus")
