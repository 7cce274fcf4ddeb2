"""python -m convit_jax.visualize as a user starts it."""

import types

import numpy as np
import pytest
from absl import flags
from conftest import ROOT, run_python, says
from PIL import Image

from convit_jax import visualize as command
from convit_jax.analysis import maps
from convit_jax.errors import UserError
from convit_jax.figures import maps as map_figures
from convit_jax.models.variants import model_settings
from convit_jax.weights.formats import Preprocessing

GOLDEN = ROOT / "tests/golden/convit_golden.pth"


def visualize(*arguments):
    return run_python("-m", "convit_jax.visualize", *arguments, timeout=200)


def test_augmentations_of_the_default_config_into_a_folder(tmp_path):
    done = visualize("--augmentations", f"--output={tmp_path}/pictures")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == f"{tmp_path}/pictures/augmentations.png"
    assert (tmp_path / "pictures/augmentations.png").stat().st_size > 10_000


def test_attention_of_a_run_on_an_image_of_its_own_test_split(trained, tmp_path):
    done = visualize(f"--checkpoint={tmp_path}/run", "--image=7", "--query=0,3", f"--output={tmp_path}/maps")
    assert (done.returncode, done.stderr) == (0, "")
    names = ("query", "query_content", "query_position", "class_token")
    files = [f"{tmp_path}/maps/{name}.{ending}" for name in names for ending in ("png", "pdf")]
    assert done.stdout.split() == files
    assert (tmp_path / "maps/query_position.pdf").read_bytes().startswith(b"%PDF")

    done = visualize(f"--run={tmp_path}/run", f"--output={tmp_path}/course")
    assert (done.returncode, done.stderr) == (0, "")
    names = ("curves", "nonlocality", "gates")
    assert done.stdout.split() == [
        f"{tmp_path}/course/{n}.{ending}" for n in names for ending in ("png", "pdf")
    ]
    (tmp_path / "run/config.json").unlink()
    sentence = f"visualize: {tmp_path}/run lacks config.json, or a line in metrics.jsonl: give the directory"
    assert says("-m", "convit_jax.visualize", f"--run={tmp_path}/run", f"--output={tmp_path}").startswith(
        sentence
    )


def test_the_init_of_a_config_at_a_photo(tmp_path):
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "photo.png")
    done = visualize("--init", f"--image={tmp_path}/photo.png", f"--output={tmp_path}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [f"{tmp_path}/init.png", f"{tmp_path}/init.pdf"]


def test_the_init_of_a_run_is_of_its_seed(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text('{"seed": 3}')
    given = {"checkpoint": str(tmp_path), "image": None, "query": None, "config": None}
    monkeypatch.setattr(flags, "FLAGS", types.SimpleNamespace(**given))
    settings = model_settings("convit_tiny", image_size=32, depth=2, local_up_to_layer=1)
    loaded = types.SimpleNamespace(settings=settings, preprocessing=None)
    monkeypatch.setattr(command, "load_weights", lambda: loaded)
    seeds = []
    monkeypatch.setattr(maps, "init_maps", lambda _, seed, *rest: seeds.append(seed) or (None, []))
    monkeypatch.setattr(map_figures, "init_page", lambda *arguments: [])
    command.draw_init(tmp_path / "maps")
    assert seeds == [3]


def test_the_image_is_what_the_network_sees(tmp_path, monkeypatch):
    pixels = np.zeros((30, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    monkeypatch.setattr(
        flags, "FLAGS", type("Flags", (), {"image": str(tmp_path / "wide.png"), "checkpoint": None})
    )
    settings = model_settings("convit_tiny", image_size=(32, 16))
    how = Preprocessing(crop_ratio=1.0, mean=(0.5,) * 3, std=(0.25,) * 3)
    image, normalised = command.read_image(settings, how)
    assert image.shape == (32, 16, 3)
    assert image.min() == 255  # the centre
    np.testing.assert_allclose(normalised, 2)
    with pytest.raises(UserError, match="take images of 1 channels"):
        command.read_image({**settings, "in_chans": 1}, how)


def test_a_query_is_two_numbers():
    assert command.parse_query("3, 4") == (3, 4)
    assert command.parse_query(None) is None
    for text in ("3", "3,x", "-1,2", "1,2,3"):
        with pytest.raises(UserError, match=f"--query is '{text}': give ROW,COLUMN"):
            command.parse_query(text)


def test_what_is_missing_is_said_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    weights, digits, out = f"--checkpoint={GOLDEN}", "--config=configs/digits.py", f"--output={tmp_path}"
    for arguments, sentence in (
        ((), "say what to draw: --checkpoint=PATH --image=IMAGE for"),
        (("--init",), "say where to draw it: --output=DIR."),
        (("--init", "--run=x", out), "--init and --run are different pictures: ask for one at a time."),
        (("--run=x", "--image=7", out), "--image would change nothing of what --run draws: leave it out."),
        (("--init", "--heads=3", out), "--heads would change nothing of what --init draws: leave it"),
        ((weights, "--image=x.png", digits, out), "--config would change nothing of what --checkpoint"),
        (("--augmentations", f"--output={tmp_path}/file/x.png"), "cannot make the folder"),
        ((weights, "--image=nothing.jpg", out), "cannot read the image nothing.jpg"),
        ((weights, "--image=1", "--query=9,0", out), "query is 9,0, but the images have"),
        ((weights, "--image=360", out), f"{GOLDEN} is no run directory and says nothing of images: add"),
        ((weights, "--image=3", "--config.data.dir=x", out), f"{GOLDEN} is no run directory and says"),
        ((weights, "--image=360", digits, out), "--image is 360, but the test split has the images 0 to 359"),
    ):
        assert says("-m", "convit_jax.visualize", *arguments).startswith(f"visualize: {sentence}")
