"""The progress display: lines in a file, one bar in a terminal."""

import io

from convit_jax.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_file_gets_a_line_now_and_then():
    stream = io.StringIO()
    progress = Progress("images", 100, every=0.25, stream=stream)
    for done in range(0, 101, 10):
        progress.update(done, "50 img/s")
    progress.say("finished")
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["30/100", "60/100", "90/100", "100/100"]
    assert lines[2].startswith("images 90/100  50 img/s  left 00:0")
    assert lines[-1] == "finished"


def test_terminal_gets_a_bar_that_is_removed():
    stream = Terminal()
    progress = Progress("step", 10, stream=stream)
    progress.start(4)
    progress.update(5, "loss 1.0")
    progress.say("a line that stays")
    progress.close()
    assert "step 5/10 [" in stream.getvalue()
    assert "loss 1.0" in stream.getvalue()
    assert "a line that stays\n" in stream.getvalue()
    assert stream.getvalue().rstrip(" ").endswith("\r")


def test_other_processes_print_nothing():
    stream = Terminal()
    progress = Progress("step", 10, enabled=False, stream=stream)
    progress.update(5, "loss 1.0")
    progress.say("text")
    progress.close()
    assert stream.getvalue() == ""
