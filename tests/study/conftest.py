"""A small study in a file of its own."""

import pytest

from convit_jax.study.plan import read_study

ENTRY = {"row": "a", "config": "configs/digits.py", "seeds": [0, 1]}


@pytest.fixture
def make_study(tmp_path):
    """Makes a Study of one entry per dict, which changes ENTRY."""

    def make(*entries, changes=(), **keys):
        runs = [ENTRY | entry for entry in entries or [{}]]
        plan = {"title": "Two", "question": "Do they differ?", "rows": "model", "runs": runs} | keys
        (tmp_path / "mine.py").write_text(f"def get_plan():\n    return {plan!r}\n")
        return read_study(str(tmp_path / "mine.py"), list(changes))

    return make
