"""`hyperlora fail`: a command that comes to harm on one process of several, by the real main."""

import os
import resource
import signal
import sys
import types
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))  # for toy_task
import toy_task

from hyperlora_jax.cli import main
from hyperlora_jax.errors import UserError
from hyperlora_jax.parallel import multihost
from hyperlora_jax.parallel.mesh import make_mesh


def bad_input():
    raise UserError("shoe.png: no picture")


def bug():
    raise ZeroDivisionError("by none")


def lost():
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk():  # as writes see it: no file may grow beyond this
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


def terminated():  # as by a launcher that is told to stop
    os.kill(os.getpid(), signal.SIGTERM)


HARM = {
    "terminated": terminated,
    "bad_input": bad_input,
    "bug": bug,
    "lost": lost,
    "full_disk": full_disk,
}


def add_arguments(parser):
    parser.add_argument("--workdir")
    parser.add_argument("--harm", choices=HARM)
    parser.add_argument("--on", type=int, nargs="+", default=[], help="which processes")
    parser.add_argument("--at", default="", help="make, agree or a step")


def run(args):
    harm = HARM[args.harm] if jax.process_index() in args.on else None
    print("a result of this command")
    if args.at.isdigit():
        return train(args.workdir, int(args.at), harm)
    if args.at == "make":
        multihost.first_then_others("exam", harm or (lambda: None))
    if args.at == "agree":
        if harm:
            harm()
        multihost.agree("word", "value")
    multihost.barrier("never reached by all", multihost.PATIENCE)
    return 0


def train(workdir, step, harm):
    def hook(n):
        if n == step and harm:
            harm()

    mesh = make_mesh()
    task = toy_task.toy_task(batches=toy_task.HostBatches(hook, mesh))
    toy_task.fit_toy(workdir, task, mesh=mesh, num_steps=10)
    return 0


if __name__ == "__main__":
    command = types.ModuleType("hyperlora_jax.cli.fail")
    command.add_arguments, command.run = add_arguments, run
    sys.modules["hyperlora_jax.cli.fail"] = command
    main.COMMANDS["fail"] = ("fail", "comes to harm")
    if any(word.isdigit() for word in sys.argv[sys.argv.index("--at") + 1 :][:1]):
        main.TRAINING = (*main.TRAINING, "fail")  # SIGTERM means "save and leave"
    sys.exit(main.main(["fail", *sys.argv[1:]]))
