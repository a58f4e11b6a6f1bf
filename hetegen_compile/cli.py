"""The command ``hetegen``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from tabulate import tabulate

from hetegen_compile.cost_model import preset_names
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
    _add_plan(commands)
    _add_bench(commands)
    return parser


def _add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "measure this machine (40 s, with a GPU two to three minutes) and keep its hardware profile"
    parser = commands.add_parser("calibrate", help=text, description=text)
    parser.add_argument("--json", action="store_true", help="print the profile as JSON instead of a table")
    parser.add_argument("--no-cache", action="store_true", help="do not keep the profile")
    parser.set_defaults(run=_calibrate)


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "check this installation and this machine; exit code 1 if there is a problem"
    commands.add_parser("doctor", help=text, description=text).set_defaults(run=_doctor)


def _add_hardware(parser: argparse.ArgumentParser) -> None:
    presets = ", ".join(preset_names())
    parser.add_argument(
        "--hardware", default="auto", help=f"one of {presets}, or the path of a profile (default: this machine)"
    )


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "predict a generation without weights and without running: speed, memory, the schedule"
    parser = commands.add_parser("plan", help=text, description=text)
    parser.add_argument(
        "model", help="a folder with a config.json, such a file, or a model whose config is in the hub's cache"
    )
    _add_hardware(parser)
    parser.add_argument("--gpu-memory", help='budget such as "6GiB" (default: the hardware\'s memory less a sixteenth)')
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    dtypes = "float16, bfloat16, float32 or float64"
    default = "the config's where it states one of these, else float16"
    parser.add_argument("--dtype", help=f"type of the weights, {dtypes} (default: {default})")
    parser.add_argument(
        "--split", type=_split, default="auto", help="share of rows on the host, 0 to 1 (default: %(default)s)"
    )
    parser.add_argument("--context", type=int, help="tokens of cache that the budget holds (default: what is used)")
    parser.add_argument("--max-batch", type=int, default=1, help="sequences in the budget (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print the schedules of prefill and of decode too")
    parser.add_argument("--unfold", action="store_true", help="with --table: every layer by itself")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON instead of text")
    parser.set_defaults(run=_plan)


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "run a model's shape with random weights here: measured and predicted tokens/s, split and all streamed"
    parser = commands.add_parser("bench", help=text, description=text)
    parser.add_argument("model", help="as for plan")
    parser.add_argument("--accelerator", default="auto", help="auto, cuda or emulated (default: %(default)s)")
    _add_hardware(parser)
    parser.add_argument("--gpu-memory", help='budget such as "6GiB" (default: what is free less a reserve)')
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="type of the weights (default: %(default)s)")
    cache = "of keys and values: dynamic as generate has it by itself, or static (default: %(default)s)"
    parser.add_argument("--cache", default="dynamic", help=cache)
    parser.add_argument("--pace", type=float, help="emulated only: lanes take the profile's seconds times this")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON instead of text")
    parser.set_defaults(run=_bench)


def _split(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number from 0 to 1") from error


def _plan(arguments: argparse.Namespace) -> int:
    from hetegen_compile.dry_run import plan_generation
    from hetegen_compile.dry_run.report import generation_json, generation_report

    names = ("hardware", "gpu_memory", "split", "context", "max_batch", "unfold")
    plan = plan_generation(
        arguments.model, prompt=arguments.prompt, new_tokens=arguments.new_tokens, batch=arguments.batch,
        dtype=arguments.dtype, options={name: getattr(arguments, name) for name in names},
        tell=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    if arguments.json:
        print(json.dumps(generation_json(plan), indent=2))
    else:
        print(generation_report(plan, tables=arguments.table, unfold=arguments.unfold))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from hetegen_compile.bench import bench, bench_json, bench_report

    names = ("accelerator", "hardware", "gpu_memory", "pace")
    options = {name: getattr(arguments, name) for name in names} | {"print_schedule": False}
    prompt, new_tokens = arguments.prompt, arguments.new_tokens
    found = bench(
        arguments.model, dtype=arguments.dtype, prompt=prompt, new_tokens=new_tokens, options=options,
        cache=arguments.cache,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps(bench_json(found, prompt=prompt), indent=2))
    else:
        print(bench_report(found, prompt=prompt))
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    """Measure always, and print; what the cache held is replaced."""
    from hetegen_compile.accelerators import uses_cuda
    from hetegen_compile.calibration import cache_path, calibrate, this_machine, write_profile
    from hetegen_compile.calibration.report import profile_table
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
