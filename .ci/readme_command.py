"""Print one of the README's commands: CI runs what a new user runs.

Usage: python3 .ci/readme_command.py quickstart|tests
"""

import re
import sys
from pathlib import Path

readme = Path(__file__).parents[1] / "README.md"
blocks = dict(re.findall(r"<!-- (\w+) -->\n```bash\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL))
if len(sys.argv) != 2 or sys.argv[1] not in blocks:
    sys.exit(f"README.md has the commands {sorted(blocks)}, not {sys.argv[1:]}")
print(blocks[sys.argv[1]])
