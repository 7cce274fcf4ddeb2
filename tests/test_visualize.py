"""python -m convit_jax.visualize: what each kind of picture needs, and where it is written."""

import json
import re

import pytest
from conftest import TINY
from PIL import Image

from convit_jax.analysis import maps
from convit_jax.errors import UserError
from convit_jax.training import preview

SMALL = ["--config=configs/digits.py", *(f"--config.{name}={value}" for name, value in TINY.items())]


@pytest.fixture
def visualize(run_here, monkeypatch):
    """Runs the command in this process, with few augmented images; returns the paths that it prints."""
    for name in ("IMAGES", "STEPS"):
        monkeypatch.setattr(preview, name, 2)
    return lambda *arguments: run_here("visualize", *arguments).stdout.split()


def both(directory, *names):
    return [f"{directory}/{name}.{kind}" for name in names for kind in ("png", "pdf")]


def test_attention_and_course_of_a_run(trained, visualize, tmp_path):
    run, out = f"{tmp_path}/run", tmp_path / "new/maps"
    paths = visualize(f"--checkpoint={run}", "--image=7", "--query=0,3", f"--output={out}")
    assert paths == both(out, "query", "query_content", "query_position", "class_token")
    assert (out / "query_position.pdf").read_bytes().startswith(b"%PDF")
    shown = ["--image=7", "--layers=3,1", "--html", f"--output={out}"]
    assert visualize(f"--checkpoint={run}", *shown) == [f"{out}/attention.html"]
    page = (out / "attention.html").read_text()
    assert re.findall(r'"number": (\d)', page) == ["1", "3"]
    assert not re.search("(src|href)=|://", page)  # needs no network
    paths = visualize(f"--run={run}", f"--output={out}")
    assert paths == both(out, "curves", "nonlocality", "gates")
    (trained / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=f"{run} has an empty metrics.jsonl, or none"):
        visualize(f"--run={run}", f"--output={out}")


def test_init_of_a_config_and_of_a_run_with_its_seed(trained, visualize, tmp_path, monkeypatch):
    seeds = []
    init_maps = maps.init_maps
    monkeypatch.setattr(maps, "init_maps", lambda *given: seeds.append(given[1]) or init_maps(*given))
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "photo.png")
    paths = visualize("--init", *SMALL, f"--image={tmp_path}/photo.png", f"--output={tmp_path}")
    assert paths == both(tmp_path, "init")
    saved = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(saved | {"seed": 3}))
    assert visualize("--init", f"--checkpoint={trained}", f"--output={tmp_path}") == both(tmp_path, "init")
    assert seeds == [0, 3]


def test_augmentations_into_a_file_or_a_folder(visualize, tmp_path):
    for output, path in (("new", "new/augmentations.png"), ("some.png", "some.png")):
        assert visualize("--augmentations", f"--output={tmp_path}/{output}") == [f"{tmp_path}/{path}"]
        with Image.open(tmp_path / path) as picture:
            assert min(picture.size) > 400
    with pytest.raises(UserError, match=r"cannot write the picture x\.gif\.x \(Format 'x' is not"):
        visualize("--augmentations", "--output=x.gif.x")
