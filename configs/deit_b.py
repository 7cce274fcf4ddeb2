"""DeiT-B on ImageNet, 300 epochs; the paper's top-1: 81.8."""

from configs import default


def get_config():
    return default.get_config("deit_base")
