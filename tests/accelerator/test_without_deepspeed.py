"""DeepSpeed is optional: the package imports where it is not installed."""

import subprocess
import sys

CODE = """
import sys

sys.modules["deepspeed"] = None  # as if it were not installed
from accelerate.utils import is_deepspeed_available

assert not is_deepspeed_available()
from hf_gradutils import GradUtilsAccelerator, GradUtilsTrainer, check_invariance
"""


def test_the_package_imports_without_deepspeed():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
