"""README.md, docs/ and examples/: commands can be typed as they stand, Python runs, links lead somewhere."""

import argparse
import json
import pickle
import re
import runpy
import shlex
import sys
import textwrap

import numpy as np
import pytest
from conftest import GOLDEN, ROOT

import convit_jax
from convit_jax import cli
from convit_jax.config import load_config
from convit_jax.study import plan

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [ROOT / "examples/slurm.sh"]
# What a page leaves out.
WHOLE = {"--config=...": "--config=configs/convit_s.py", "train.py ...": "train.py", "\\\n": " "}
ADDED = ["--config=configs/convit_s.py"]  # stands for the command to which a table adds flags


class Parsed(Exception):
    """The flags of a command are right."""


def code(page):
    """The lines of a page's blocks of code, and the code inside its text, unless it is of an earlier commit."""
    text = page.read_text() if page.suffix == ".md" else textwrap.indent(page.read_text(), "    ")
    text = re.sub(r"^```(python|bibtex)\n.*?^```", "", text, flags=re.S | re.M)
    for part, whole in WHOLE.items():
        text = text.replace(part, whole)
    text = re.sub(r"(`[^`]+`|^    .*)[, ]+at\s+commit", "", text, flags=re.M)
    return re.findall(r"^    (?! )(.*)", text, re.M) + re.findall(r"`([^`\n]+)`", text)


def commands(page):
    """The commands of this project on a page, as lists of words: ["train.py", "--config=configs/convit_s.py"]."""
    for line in code(page):
        words = shlex.split(line, comments=True)
        programs = [word.removeprefix(".venv/bin/") for word in words]
        if "python" in programs:
            words = words[programs.index("python") + 1 :]
            yield words[1:] if words[0] == "-m" else words
        elif words and re.fullmatch("convit-[a-z]+", words[0]):
            name = words[0].removeprefix("convit-")
            yield ["train.py" if name == "train" else f"convit_jax.{name}", *words[1:]]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # other tests import commands
@pytest.mark.parametrize("page", PAGES + SCRIPTS, ids=lambda page: page.name)
def test_every_command_can_be_typed(page, monkeypatch):
    def launch(name, main, *, define=lambda: None, config=None, arguments="", processes=False, **others):
        cli._parse(sys.argv, [cli._define_processes, define] if processes else [define], config, arguments)
        raise Parsed

    def parse_args(parser, *given):
        assert not parser.parse_known_args(*given)[1]
        raise Parsed

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "launch", launch)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    for words in commands(page):
        monkeypatch.setattr(sys, "argv", words)
        run = runpy.run_path if words[0].endswith(".py") else runpy.run_module
        if words[1:]:  # a command without arguments has no flags to check, and benchmarks.eager no parser
            with pytest.raises(Parsed):
                run(words[0], run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_of_a_config_exists(page):
    for line in code(page):
        if re.match("--config[.=]", line) and "FIELD" not in line:
            load_config([*ADDED, *(word for word in shlex.split(line) if re.match("--config[.=]", word))])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            headings = re.findall("^#+ (.*)", file.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def snippet(page):
    """The first Python snippet of a page."""
    return re.search(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)[1]


def test_the_readme_goes_from_a_photo_to_labels(trained, image_folder, monkeypatch, capsys):
    monkeypatch.chdir(image_folder / "val/ant")
    run = snippet("README.md").replace("convit_small", str(trained))
    exec(run.replace("cat.jpg", "0.jpg").replace("dog.jpg", "1.jpg"), {})
    assert re.search(r"^\['\d', '\d'\]$", capsys.readouterr().out, re.M)


def test_the_page_on_python_is_the_notebook_and_its_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = re.split(r"^```(?:python)?\n", (ROOT / "docs/python.md").read_text(), flags=re.M)
    cells = json.loads((ROOT / "examples/own_loop.ipynb").read_text())["cells"]
    assert ["".join(cell["source"]) for cell in cells] == [part.strip("\n") for part in page if part.strip("\n")]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["accuracy"] > 0.7


def test_the_script_for_cifar10_makes_an_image_folder(tmp_path, monkeypatch):
    from convit_jax.data.sources import ImageFolder

    source = tmp_path / "cifar-10-batches-py"
    source.mkdir()
    (source / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}))
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)
        (source / name).write_bytes(pickle.dumps({b"labels": [0, 1, 0, 1], b"data": pixels}))
    monkeypatch.setattr(sys, "argv", ["cifar10_folder.py", str(source), str(tmp_path / "CIFAR10")])
    runpy.run_path(str(ROOT / "examples/cifar10_folder.py"))
    train, test = (ImageFolder(str(tmp_path / "CIFAR10"), split) for split in ("train", "test"))
    assert (len(train.labels), len(test.labels), train.class_names) == (8, 4, ("cat", "dog"))


def test_the_example_of_a_study_can_be_read():
    assert len(plan.read_study(str(ROOT / "examples/learning_rate.py"), []).runs) == 9


def test_weights_load_for_other_classes_and_sizes():
    golden = GOLDEN / "convit_golden.safetensors"
    names = {"convit_jax": convit_jax}
    exec(snippet("docs/checkpoints.md").replace("convit_small", str(golden)).replace("384", "64"), names)
    assert names["model"].head.kernel.shape[-1] == 10
