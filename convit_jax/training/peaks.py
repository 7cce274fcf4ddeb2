"""Peak arithmetic of devices, for the share of it that a training reaches (MFU).

Dense bfloat16, without sparsity, from the makers' data sheets. A device that is not here and a training in
another dtype get no MFU: what those can do is measured by `python -m benchmarks.model`.
"""

import re

# Words of the name that JAX gives: FLOP/s of one device. The first that fits counts.
PEAKS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(device_kind, dtype):
    """FLOP/s of a device by its name, as "NVIDIA H100 80GB HBM3", or None."""
    if dtype != "bfloat16":
        return None
    return next((flops for words, flops in PEAKS.items() if re.search(rf"\b{words}\b", device_kind)), None)
