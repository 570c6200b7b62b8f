"""`make audit`: known vulnerabilities of what is installed, asked of PyPI's advisories by pip-audit.

A finding fails, and so does anything unexpected. Where the advisories cannot be reached, that is said and it
passes: a machine without a network has no news, neither good nor bad.
"""

from __future__ import annotations

import json
import subprocess
import sys

_UNREACHABLE = (
    "could not connect",
    "connection",
    "max retries exceeded",
    "timed out",
    "proxy",
    "name resolution",
    "serviceerror",
    "service unavailable",
    "certificate",
)


def verdict(said: str, complained: str) -> tuple[int, str]:
    """Exit code and words for what pip-audit wrote to stdout and stderr."""
    try:
        told = json.loads(said)["dependencies"]
    except (ValueError, KeyError, TypeError):
        if any(sign in complained.lower() for sign in _UNREACHABLE):
            return 0, "audit: the advisories could not be reached; nothing was audited"
        return 2, f"audit: pip-audit did not answer\n{complained.strip()}"
    audited = [one for one in told if "skip_reason" not in one]
    found = [
        f"  {one['name']} {one['version']}: {flaw['id']}"
        f" (fixed in {', '.join(flaw.get('fix_versions') or []) or 'no version yet'})"
        for one in audited
        for flaw in one["vulns"]
    ]
    if found:
        return 1, "\n".join([f"audit: {len(found)} known vulnerabilities", *found])
    if not audited:
        return 0, f"audit: the advisories could not be reached; none of {len(told)} packages was audited"
    unknown = len(told) - len(audited)
    return 0, f"audit: {len(audited)} packages, no known vulnerability; {unknown} unknown to the advisories"


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--format", "json"]
    try:
        done = subprocess.run(
            [*command, "--progress-spinner", "off"], capture_output=True, text=True, timeout=900
        )
        code, words = verdict(done.stdout, done.stderr)
    except subprocess.TimeoutExpired as late:
        code, words = verdict("", f"Read timed out: {late}")
    print(words)
    return code


if __name__ == "__main__":
    sys.exit(main())
