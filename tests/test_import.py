"""`import fastvim` costs little beside `import timm`, and brings no library of its own."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import json, sys, time
import timm
before, start = set(sys.modules), time.process_time()
import fastvim
seconds, loaded = time.process_time() - start, set(sys.modules) - before
timm.create_model("fastvim_tiny_patch16_224", depth=1)
detector = "fastvim.models.heads.cascade"
before_use = detector in sys.modules
fastvim.models.CascadeMaskRCNN
print(json.dumps([seconds, sorted(loaded), before_use, detector in sys.modules]))
"""


def test_import_fastvim_beside_timm():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    seconds, loaded, before_use, after_use = json.loads(run.stdout)
    others = {name for name in loaded if name.split(".")[0] != "fastvim"}
    assert {name for name in others if name.split(".")[0] not in sys.stdlib_module_names} == set()
    assert seconds < 0.3
    assert not before_use  # it loads when it is first used
    assert after_use
