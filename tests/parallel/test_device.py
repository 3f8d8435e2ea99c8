import platform
import subprocess
import sys

import pytest

# In a process of its own: how one allocates cannot be changed back.
PROGRAM = """
import os
from pathlib import Path
import torch
from moco.parallel.device import keep_freed_memory, return_freed_memory

def held():
    torch.zeros(100_000_000)  # 400 MB, which are free again in the next line
    return resident()

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

start = resident()
unasked = held() - start
keep_freed_memory()
kept = held() - start
return_freed_memory()
print(unasked < 1e8, kept > 3e8, resident() - start < 1e8)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is meant")
def test_freed_memory_is_kept_until_it_is_returned() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True"] * 3, run.stdout
