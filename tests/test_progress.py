"""The progress display: lines in a file, one bar in a terminal."""

import os
import subprocess
import sys

from conftest import ROOT

from convit_jax.progress import Lasting, Progress


def test_file_gets_a_line_now_and_then(capsys):
    progress = Progress("images", 100, every=0.25)
    for done in range(0, 101, 10):
        progress.update(done, "50 img/s")
    progress.say("finished")
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["30/100", "60/100", "90/100", "100/100"]
    assert lines[2].startswith("images 90/100  50 img/s  left 00:0")
    assert lines[-1] == "finished"


def test_terminal_of_the_first_process_gets_a_bar_that_is_removed(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for enabled in (False, True):
        progress = Progress("step", 10, enabled=enabled)
        progress.start(4)
        progress.update(5, "loss 1.0")
        progress.say("a line that stays")
        progress.close()
        shown = capsys.readouterr().out
        assert enabled or shown == ""
    assert "step 5/10 [" in shown
    assert "loss 1.0" in shown
    assert "a line that stays\n" in shown
    assert shown.rstrip(" ").endswith("\r")


def test_a_training_outlives_the_readers_of_its_output(tmp_path):
    code = """if True:
        import sys, time
        from convit_jax.progress import outlive_readers
        outlive_readers()
        print("first", flush=True)
        time.sleep(1)
        for number in range(3):
            print("more", flush=True)
            print("to a closed stream", file=sys.stderr)
        open(sys.argv[1], "w").write("went on")
    """
    command = 'exec 2>&-; "$0" -c "$1" "$2" | head -1; exit ${PIPESTATUS[0]}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, code, tmp_path / "end"], capture_output=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, b"first\n")
    assert (tmp_path / "end").read_text() == "went on"


def test_an_output_that_is_full_for_a_moment_goes_on():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with Lasting(writer, "w") as output, open(reader, "rb", buffering=0) as pipe:
        for _ in range(100):
            output.write(bytes(4096))  # a pipe holds 16 of them
        pipe.read(1 << 20)
        output.write(b"goes on")
        assert pipe.read(100) == b"goes on"
