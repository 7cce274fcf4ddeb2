"""The attention of every patch as one HTML page (page.html), which needs no network."""

import base64
import gzip
import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from convit_jax.analysis.maps import LayerMaps
from convit_jax.figures.maps import faded, palette
from convit_jax.rundir import atomic_write, disk_errors

TEMPLATE = Path(__file__).with_name("page.html")


def write_page(
    path: Path, layers: Mapping[int, LayerMaps], image: np.ndarray, grid: tuple[int, int], title: str
) -> list[Path]:
    """Writes the page of some layers by number, for a uint8 image [H, W, 3]; returns its path.

    An attention a is stored as the byte round(255 sqrt(a)), so it is off by at most 0.004; position, a product of
    two such factors, by 0.008.
    """
    arrays = [each for layer in layers.values() for each in (layer.content, layer.rows, layer.columns)]
    maps = b"".join(np.rint(255 * np.sqrt(each)).astype(np.uint8).tobytes() for each in arrays if each is not None)
    data = {
        "title": title,
        "grid": grid,
        "layers": [
            {
                "number": number,
                "heads": layer.content.shape[0],
                "size": layer.content.shape[1],
                "gates": None if layer.gates is None else layer.gates.tolist(),
            }
            for number, layer in layers.items()
        ],
        "image": _to_uri(Image.fromarray(image)),
        "faded": _to_uri(faded(image, grid)),
        "palette": _to_text(palette()(np.arange(256), bytes=True).tobytes()),
        "maps": _to_text(gzip.compress(maps, mtime=0)),
    }
    words = json.dumps(data).replace("<", "\\u003c")  # a title must not end the script
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(TEMPLATE.read_text().replace("{{data}}", words))
    return [path]


def _to_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _to_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{_to_text(file.getvalue())}"
