"""The page of attention, in a browser: every control works and shows the numbers of the model."""

import json
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest

from convit_jax import create_model
from convit_jax.analysis.maps import full_maps, layer_maps
from convit_jax.figures.page import write_page

BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium")
SMALL = dict(image_size=(12, 16), patch_size=4, embed_dim=16, depth=3, num_classes=5, num_heads=4)
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
IMAGE = jax.random.normal(jax.random.key(0), (12, 16, 3))
STEPS = """
const shown = [], byTag = tag => [...document.querySelectorAll(tag)];
const note = () => shown.push({
  where: byId("where").textContent,
  layer: byId("layer-name").textContent,
  captions: byTag(".line").map(line => line.textContent),
  pixels: byTag(".map canvas").map(canvas => canvas.toDataURL()).join(),
  heads: byTag(".head").map((_, head) => look(data.layers[slider.value], head)),
});
const choose = (input, value) => { input.value = value; input.dispatchEvent(new Event("input")); note(); };
const press = key => { document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true })); note(); };
setTimeout(() => {
  note();
  const box = photo.getBoundingClientRect(); // a click into row 0, column 3
  const [clientX, clientY] = [box.left + 0.9 * box.width, box.top + 0.1 * box.height];
  document.elementFromPoint(clientX, clientY).dispatchEvent(new MouseEvent("click", { clientX, clientY, bubbles: true }));
  note();
  photo.focus();
  press("ArrowRight"); // stays in the image
  press("ArrowDown");
  choose(slider, slider.max);
  byTag("input[type=radio]").slice(1).forEach(radio => { radio.click(); note(); });
  choose(slider, 0);
  document.body.replaceChildren(JSON.stringify(shown));
}, 500);
"""


@pytest.fixture
def steps(tmp_path):
    """A function: what a model's page shows after each of STEPS."""
    if BROWSER is None:
        pytest.skip("there is no chromium")

    def run(model, title="x"):
        layers = dict(enumerate(full_maps(model, IMAGE), 1))
        (path,) = write_page(tmp_path / "new/page.html", layers, PIXELS, model.grid, title)
        path.write_text(path.read_text().replace("</body>", f"<script>{STEPS}</script></body>"))
        how = ["--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom"]
        command = [BROWSER, "--headless", *how, f"--user-data-dir={tmp_path}", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert "CONSOLE" not in done.stderr, done.stderr
        return json.loads(re.search(r"<body.*?>(.*)</body>", done.stdout, re.DOTALL)[1])

    return run


def assert_shows(step, name, values):
    """Attention of every head, [H, rows, columns], but for rounding."""
    found = [head["maps"][name] for head in step["heads"]]
    np.testing.assert_allclose(found, values.reshape(4, 12), atol=0.006)


def test_clicks_and_keys_choose_what_is_shown(steps):
    model = create_model("convit_tiny", **SMALL, local_up_to_layer=2)
    start, clicked, edge, below, last, token, first = steps(model, "</script>")
    assert [each["where"] for each in (start, clicked, edge, below, token)] == [
        "Patch at row 1, column 2",
        "Patch at row 0, column 3",
        "Patch at row 0, column 3",
        "Patch at row 1, column 3",
        "From the class token",
    ]
    assert [each["layer"] for each in (start, last, first)] == ["1 (GPSA)", *2 * ["3 (plain attention)"]]
    assert start["captions"][3] == "Head 4gate 0.73"
    assert len({each["pixels"] for each in (start, clicked, below, last, token)}) == 5
    for step, patch in ((start, (1, 2)), (clicked, (0, 3)), (below, (1, 3))):
        expected = layer_maps(model, IMAGE, patch)[0]
        assert_shows(step, "content", expected.content)
        assert_shows(step, "position", expected.position)
        assert_shows(step, "gated sum", expected.query)
    expected = layer_maps(model, IMAGE, (1, 3))[2]
    assert_shows(last, "attention", expected.query)
    assert_shows(token, "attention", expected.tokens[0])
    np.testing.assert_allclose([head["toTokens"] for head in token["heads"]], expected.tokens_tokens[0], atol=0.006)


def test_distilled_deit(steps):
    model = create_model("deit_tiny", **SMALL, distilled=True)
    *_, last, class_token, distillation_token, first = steps(model)
    expected = layer_maps(model, IMAGE, (1, 3))
    assert_shows(last, "attention", expected[2].query)
    assert_shows(class_token, "attention", expected[2].tokens[0])
    assert_shows(distillation_token, "attention", expected[2].tokens[1])
    assert_shows(first, "attention", expected[0].tokens[1])
    assert re.fullmatch(r"Head 1class token \d+ %; distillation token \d+ %", first["captions"][0]), first["captions"]
