"""Print the lowest version that `pyproject.toml` allows of each dependency, as constraints for pip.

Usage: python3 .ci/lowest.py
"""

import re
from pathlib import Path

project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
needed = re.search(r"^dependencies = \[\n(.*?)^\]", project, re.DOTALL | re.MULTILINE)
bounds = re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\w.]+)', needed[1]) if needed else []
if not bounds or len(bounds) != needed[1].count('"') // 2:
    raise SystemExit("pyproject.toml has a dependency without a lowest version")
print("\n".join(f"{name}=={version}" for name, version in bounds))
