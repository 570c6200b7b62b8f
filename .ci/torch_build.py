"""Says so if the torch that pip found for this checkout is not the CPU build."""

from importlib.metadata import version

import torch

if torch.version.cuda or getattr(torch.version, "hip", None):
    print(
        f"pip's index has no CPU build of torch, so this is torch {version('torch')} with GPU libraries: "
        "everything works, it only takes more disk.\nFor the CPU build, name the index that "
        "https://pytorch.org/get-started/locally shows for CPU in PIP_EXTRA_INDEX_URL, run `make clean`, "
        "and again.\n"
        "pip 找到的不是 CPU 版的 torch：一切照常可用，只是占用更多磁盘。"
        "想要 CPU 版，请把上面网页中 CPU 一栏的索引地址写进 PIP_EXTRA_INDEX_URL，运行 make clean 后再来一次。"
    )
