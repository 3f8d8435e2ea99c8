import subprocess
import sys

import pytest

# In a process of its own: how one allocates cannot be changed back.
PROGRAM = """
import resource
import torch
from moco.allocator import keep_freed_memory, return_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(10_000_000)  # 40 MB, more than glibc keeps unasked
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

unasked = min(faults() for _ in range(8))
keep_freed_memory()
kept = min(faults() for _ in range(8))  # the first few find no place that is large enough
return_freed_memory()
print(unasked > 5_000, kept < 500, faults() > 5_000)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is meant")
def test_freed_memory_is_kept_until_it_is_returned() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True"] * 3, run.stdout
