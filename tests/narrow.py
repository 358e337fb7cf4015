"""train.py with narrow and shallow presets: python tests/narrow.py --preset large ..."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from model import PRESETS  # noqa: E402  found by the line above

for name, config in PRESETS.items():
    PRESETS[name] = replace(config, dim=48, depth=3, heads=2)
runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
