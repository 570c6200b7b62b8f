"""Run pages and write what their code printed below each block.

    python -m tests.docs.write                         every page
    python -m tests.docs.write docs/en/lessons/1-*.md  these

A block that prints gets its ```text block; one whose output is equal but for a time is left as it is.
"""

import sys
from pathlib import Path

import torch

from tests.docs.pages import name_of, pages, run, same


def rewritten(path: Path) -> str:
    """The page with the outputs of a fresh run."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for ran in reversed(run(path)):
        code, printed = ran.code, ran.printed
        if code.output_lines is not None:
            start, end = code.output_lines
            if printed and not same("".join(lines[start:end]), printed):
                lines[start:end] = [printed]
            elif not printed:
                del lines[code.end : end + 1]
        elif printed:
            lines[code.end : code.end] = [f"\n```text\n{printed}```\n"]
    return "".join(lines)


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    for path in [Path(name).resolve() for name in names] or pages():
        before, after = path.read_text(encoding="utf-8"), rewritten(path)
        path.write_text(after, encoding="utf-8")
        print(f"{name_of(path)}: {'as it was' if before == after else 'rewritten'}")


if __name__ == "__main__":
    main(sys.argv[1:])
