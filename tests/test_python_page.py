"""docs/python.md and its notebook: the same text, and code that runs."""

import json
import re

from conftest import ROOT


def test_the_page_is_the_notebook_and_its_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = re.split(r"^```(?:python)?\n", (ROOT / "docs/python.md").read_text(), flags=re.M)
    parts = [part.strip("\n") for part in page if part.strip("\n")]
    cells = json.loads((ROOT / "examples/own_loop.ipynb").read_text())["cells"]
    assert ["".join(cell["source"]) for cell in cells] == parts
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["accuracy"] > 0.7
