"""Everything small, in under ten minutes: `python benchmarks/quick.py --data-root DATA`.

Runs each benchmark with few epochs, small networks and few rounds, and writes to `--folder` what the long
runs write to `benchmarks`: tables, raw numbers, plots and one page. The numbers show that everything works
and about where it lands; those of the long runs are the ones to quote.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from data import add_data_root

HERE = Path(__file__).parent
DATA, WORK = "with data", "keeps files"
NOTE = (
    "A quick run: few epochs, few rounds, one seed. It shows that everything works, not what can be reached."
)
QUICK = (
    (DATA, "accuracy.py keywords --epochs 4 --methods dense tuned structural torch-pruning"),
    (DATA, "accuracy.py motion_cnn --base 5 --epochs 5 --methods dense structural magnitude ModelPruning"),
    (WORK, "latency.py --networks dscnn_keywords resnet8_tiny resnet56_cifar --seconds 10"),
    (WORK, "latency.py --networks dscnn_keywords resnet8_tiny --seconds 10 --engine openvino"),
    ("", "magnitude_cost.py update --sizes 1e6 --rounds 3"),
    ("", "training_cost.py --rounds 5"),
    ("", f"summary.py --note {NOTE!r}"),
)


def main() -> None:
    """Run one after the other; stop at the first that fails."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add_data_root(parser)
    parser.add_argument("--folder", type=Path, default=Path("runs/quick"), help="where everything goes")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    environment = {**os.environ, "LIGHTNING_PRUNE_RESULTS": str(folder / "results")}
    start = time.monotonic()
    for needs, command in QUICK:
        script, *rest = shlex.split(command)
        if needs:
            rest += ["--work", str(folder / "work")]
        if needs == DATA:
            rest += ["--data-root", str(arguments.data_root)]
        print(f"== {command}", flush=True)
        subprocess.run([sys.executable, str(HERE / script), *rest], check=True, env=environment)
    print(f"\n{time.monotonic() - start:.0f} s; {folder / 'README.md'}")


if __name__ == "__main__":
    main()
