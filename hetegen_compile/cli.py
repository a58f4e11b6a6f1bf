"""The command ``hetegen``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from tabulate import tabulate

from hetegen_compile.errors import HetegenError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; ``argv`` defaults to the process's arguments.

    Returns:
        The exit code: 0, or 1 if something is wrong. argparse exits with 2 for wrong arguments.
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except HetegenError as error:
        print(f"hetegen: {error}", file=sys.stderr)
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hetegen", description="Run PyTorch models that are larger than the GPU's memory."
    )
    commands = parser.add_subparsers(metavar="command", required=True)
    _add_calibrate(commands)
    _add_doctor(commands)
    return parser


def _add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "measure this machine (less than a minute) and keep its hardware profile"
    parser = commands.add_parser("calibrate", help=text, description=text)
    parser.add_argument("--json", action="store_true", help="print the profile as JSON instead of a table")
    parser.add_argument("--no-cache", action="store_true", help="do not keep the profile")
    parser.set_defaults(run=_calibrate)


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "check this installation and this machine; exit code 1 if there is a problem"
    commands.add_parser("doctor", help=text, description=text).set_defaults(run=_doctor)


def _calibrate(arguments: argparse.Namespace) -> int:
    """Measure always, and print; what the cache held is replaced."""
    from hetegen_compile.calibration import cache_path, calibrate, this_machine, write_profile
    from hetegen_compile.calibration.report import profile_table
    from hetegen_compile.calibration.runner import uses_cuda
    from hetegen_compile.cost_model import profile_to_json

    profile = calibrate()
    print(json.dumps(profile_to_json(profile), indent=2) if arguments.json else profile_table(profile))
    path = None if arguments.no_cache else cache_path(this_machine(cuda=uses_cuda("auto")))
    if not arguments.no_cache and write_profile(path, profile):
        print(f'kept in {path}; to name it: options={{"hardware": "{path}"}}', file=sys.stderr)
    else:
        print("not kept", file=sys.stderr)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from hetegen_compile.doctor import examine

    checks = examine()
    rows = [(check.status, check.subject, check.finding, check.remedy) for check in checks]
    print(tabulate(rows, headers=["", "subject", "found", "remedy"], disable_numparse=True))
    return int(any(check.status == "problem" for check in checks))


if __name__ == "__main__":
    sys.exit(main())
