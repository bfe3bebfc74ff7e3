"""Everything small, in under ten minutes: `python benchmarks/quick.py --data-root DATA`.

Runs each benchmark with few epochs, small networks and few rounds, and writes to `--results` what the long
runs write to `benchmarks/results`. The numbers show that everything works and about where it lands; those
of the long runs are the ones to quote.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from data import add_data_root

HERE = Path(__file__).parent
DATA = "with data"
QUICK = (
    (DATA, "accuracy.py keywords --epochs 8 --methods dense tuned structural magnitude joint torch-pruning"),
    (DATA, "accuracy.py motion_cnn --epochs 5 --methods dense structural joint ModelPruning"),
    ("", "latency.py --networks dscnn_keywords resnet8_tiny resnet56_cifar --seconds 15"),
    ("", "magnitude_cost.py update --sizes 1e6 --rounds 3"),
)


def main() -> None:
    """Run one after the other; stop at the first that fails."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add_data_root(parser)
    parser.add_argument(
        "--results", type=Path, default=Path("runs/quick"), help="where tables and raw numbers go"
    )
    arguments = parser.parse_args()
    environment = {**os.environ, "LIGHTNING_PRUNE_RESULTS": str(arguments.results.absolute())}
    start = time.monotonic()
    for needs, command in QUICK:
        script, *rest = command.split()
        if needs == DATA:
            rest += ["--data-root", str(arguments.data_root), "--work", str(arguments.results / "work")]
        print(f"== {command}", flush=True)
        subprocess.run([sys.executable, str(HERE / script), *rest], check=True, env=environment)
    print(f"\n{time.monotonic() - start:.0f} s; tables in {arguments.results}")


if __name__ == "__main__":
    main()
