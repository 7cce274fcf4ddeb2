"""The page of attention, in a browser: every control works and shows the given numbers."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from convit_jax.analysis.maps import LayerMaps
from convit_jax.figures.page import write_page

BROWSER = shutil.which("chromium-headless-shell") or shutil.which("chromium")
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
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
const press = key => {
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  note();
};
setTimeout(() => {
  note();
  const box = photo.getBoundingClientRect(); // a click into row 0, column 3
  const [clientX, clientY] = [box.left + 0.9 * box.width, box.top + 0.1 * box.height];
  const click = new MouseEvent("click", { clientX, clientY, bubbles: true });
  document.elementFromPoint(clientX, clientY).dispatchEvent(click);
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


def test_a_page_of_convit_s_is_below_5_mb(tmp_path):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(9, 196, 196))  # without structure, which would take less
    content = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    layer = LayerMaps(content, gates=None, rows=None, columns=None)
    (path,) = write_page(tmp_path / "page.html", {1: layer}, PIXELS, (14, 14), "x")
    assert 12 * path.stat().st_size < 5e6  # for twelve layers


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium")
def test_clicks_and_keys_choose_what_is_shown(tmp_path):
    rng = np.random.default_rng(0)
    attention = lambda size: rng.dirichlet(np.full(size, 0.5), (4, size))  # noqa: E731
    gpsa = LayerMaps(content=attention(12), gates=rng.random(4), rows=attention(3), columns=attention(4))
    plain = LayerMaps(content=attention(14), gates=None, rows=None, columns=None)  # with both tokens
    (path,) = write_page(tmp_path / "new/page.html", {1: gpsa, 6: plain}, PIXELS, (3, 4), "</script>")
    path.write_text(path.read_text().replace("</body>", f"<script>{STEPS}</script></body>"))
    how = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path}"]
    command = [BROWSER, *how, "--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "CONSOLE" not in done.stderr, done.stderr
    steps = json.loads(re.search(r"<body.*?>(.*)</body>", done.stdout, re.DOTALL)[1])
    patches = [f"Patch at row {row}, column {column}" for row, column in ((1, 2), (0, 3), (0, 3), (1, 3), (1, 3))]
    tokens = [f"From the {name} token" for name in ("class", "distillation")]
    assert [step["where"] for step in steps] == [*patches, *tokens, tokens[1]]
    layers = [step["layer"] for step in steps]
    assert layers == 4 * ["1 (GPSA)"] + 4 * ["6 (plain attention)"]  # the last cannot go back: the tokens are not there
    assert [len({step[key] for step in steps}) for key in ("pixels", "where")] == [6, 5]
    assert steps[0]["captions"][3] == f"Head 4gate {gpsa.gates[3]:.2f}"
    for step, (row, column) in ((0, (1, 2)), (1, (0, 3)), (3, (1, 3))):
        content, gates = gpsa.content[:, 4 * row + column], gpsa.gates[:, None]
        position = np.einsum("hy,hx->hyx", gpsa.rows[:, row], gpsa.columns[:, column]).reshape(4, 12)
        expected = {"content": content, "position": position, "gated sum": (1 - gates) * content + gates * position}
        for name, maps in expected.items():
            np.testing.assert_allclose([head["maps"][name] for head in steps[step]["heads"]], maps, atol=0.01)
    for step, token in ((4, 2 + 7), (5, 0), (6, 1)):
        found = [head["toTokens"] + head["maps"]["attention"] for head in steps[step]["heads"]]
        np.testing.assert_allclose(found, plain.content[:, token], atol=0.005)
