"""`hyperlora serve` of the shipped checkpoint in a process of its own."""

import contextlib
import os
import socket
import subprocess
import sys


@contextlib.contextmanager
def served(place, num_steps=2, program=(sys.executable, "-m", "hyperlora_jax")):
    """(process, address); it works in the folder `place`, temporary folders are in place/tmp."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (place / "tmp").mkdir()
    command = [*program, "serve", "--num_steps", str(num_steps)]
    with subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env={**os.environ, "TMPDIR": str(place / "tmp")}, cwd=place,
    ) as process:  # fmt: skip
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if line.startswith("open "):
                break
        else:
            raise AssertionError("".join(lines))
        yield process, f"http://127.0.0.1:{port}/"
        process.kill()
