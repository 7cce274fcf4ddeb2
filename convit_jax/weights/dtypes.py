"""One table of element types: PyTorch's name, its storage class, safetensors' code, NumPy's type.

The newer types have no storage class: PyTorch saves them as untyped bytes with the type written
beside. bfloat16 and the float8 types are ml_dtypes', which JAX uses for the same purpose.
"""

import ml_dtypes
import numpy as np

TABLE = (  # torch.X, torch.XStorage, safetensors, NumPy
    ("float32", "FloatStorage", "F32", np.float32),
    ("float64", "DoubleStorage", "F64", np.float64),
    ("float16", "HalfStorage", "F16", np.float16),
    ("bfloat16", "BFloat16Storage", "BF16", ml_dtypes.bfloat16),
    ("int64", "LongStorage", "I64", np.int64),
    ("int32", "IntStorage", "I32", np.int32),
    ("int16", "ShortStorage", "I16", np.int16),
    ("int8", "CharStorage", "I8", np.int8),
    ("uint8", "ByteStorage", "U8", np.uint8),
    ("bool", "BoolStorage", "BOOL", np.bool_),
    ("complex64", "ComplexFloatStorage", "C64", np.complex64),
    ("complex128", "ComplexDoubleStorage", None, np.complex128),
    ("uint16", None, "U16", np.uint16),
    ("uint32", None, "U32", np.uint32),
    ("uint64", None, "U64", np.uint64),
    ("float8_e4m3fn", None, "F8_E4M3", ml_dtypes.float8_e4m3fn),
    ("float8_e5m2", None, "F8_E5M2", ml_dtypes.float8_e5m2),
    ("float8_e8m0fnu", None, "F8_E8M0", ml_dtypes.float8_e8m0fnu),
    ("float8_e4m3fnuz", None, None, ml_dtypes.float8_e4m3fnuz),
    ("float8_e5m2fnuz", None, None, ml_dtypes.float8_e5m2fnuz),
)

TORCH = {name: np.dtype(dtype) for name, _, _, dtype in TABLE}
STORAGE = {storage: np.dtype(dtype) for _, storage, _, dtype in TABLE if storage}
SAFETENSORS = {code: np.dtype(dtype) for _, _, code, dtype in TABLE if code}
