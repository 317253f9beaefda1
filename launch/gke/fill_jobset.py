"""jobset.yaml for a slice and a command, on standard output; called by launch/gke.sh.

python3 launch/gke/fill_jobset.py NAME TYPE SLICES IMAGE COMMAND…
"""

import json
import math
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from hyperlora_jax.errors import UserError  # noqa: E402
from hyperlora_jax.parallel.topology import Topology, parse  # noqa: E402

LABELS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}


def hosts_and_chips(topology: Topology) -> tuple[int, int]:
    """Hosts of a slice and chips of a host: four, or as many as a small 2-D slice has."""
    chips = math.prod(topology.grid)
    alone = chips in (1, 4, 8) if topology.chip.dimensions == 2 else chips <= 4
    return (1, chips) if alone else (chips // 4, 4)


def filled(name: str, topology: Topology, slices: int, image: str, command: list[str]) -> str:
    """The file's text with every line marked SET set."""
    hosts, chips = hosts_and_chips(topology)
    values = {
        "name": name,
        "replicas": slices * topology.num_slices,
        "parallelism": hosts,
        "completions": hosts,
        "cloud.google.com/gke-tpu-accelerator": LABELS[topology.chip.name],
        "cloud.google.com/gke-tpu-topology": "x".join(map(str, topology.grid)),
        "image": image,
        "command": json.dumps(command),
        "google.com/tpu": chips,
    }
    lines = []
    for line in (HERE / "jobset.yaml").read_text().splitlines():
        if marked := re.fullmatch(r"( *)([^ :#]+): .* # SET.*", line):
            line = f"{marked[1]}{marked[2]}: {values.pop(marked[2])}"
        lines.append(line)
    if values:
        raise SystemExit(f"jobset.yaml: no line marked SET for {', '.join(values)}")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Prints the file; exit code 2 for a slice that is none."""
    name, kind, slices, image, *command = sys.argv[1:]
    try:
        print(filled(name, parse(kind), int(slices), image, command), end="")
    except UserError as error:
        print(f"gke: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
