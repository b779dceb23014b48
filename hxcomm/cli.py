"""The `hxcomm` command: what is installed, what a Schedule looks like, and the proof that one is right.

Everything here asks the module that owns the answer; this file knows only how to print it. No torch is imported, and
`show` and `prove` need no built extension.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hxcomm
from hxcomm import build_check, environment
from hxcomm.bench import chip_arguments
from hxcomm.predict import arguments as predict_arguments
from hxcomm.simulate import arguments as simulate_arguments
from hxcomm.tune import arguments as tune_arguments

ROOTED_AT = 0  # the root that `show` draws; `prove` takes the last rank, too


CHIPS_MEASURE = "chips measure"


class UsageError(Exception):
    """The command line names something that does not exist. The text lists what does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0, 1 where something was found wrong, 2 for a wrong command line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:2] == CHIPS_MEASURE.split():  # `chips` takes the name of a chip there, so this is a command of its own
        words[:2] = [CHIPS_MEASURE]
    options = _parser().parse_args(words)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except UsageError as error:
        print(f"hxcomm {options.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `hxcomm show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hxcomm",
        description="Collective communication for a simulated ring of AI chips.",
        epilog='Programs use it through torch.distributed: init_process_group(backend="hxcomm") under torchrun.',
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="versions, processor, algorithms and every HXCOMM_* variable")
    info.set_defaults(run=_info)

    show = commands.add_parser("show", help="draw a Schedule: who moves what in which round")
    show.add_argument("op", metavar="OP", help="a collective, e.g. all_reduce")
    show.add_argument("algorithm", metavar="ALGORITHM", help="e.g. ring (`hxcomm info` lists them)")
    show.add_argument("--ranks", type=_count, default=4, metavar="N", help="world size (default: 4)")
    show.add_argument("--hosts", type=_hosts, metavar="H,H", help="the host of each rank instead, e.g. 0,0,1,1")
    show.add_argument("--staged", action="store_true", help="as it runs on private memory (CPU tensors)")
    show.add_argument("--plan", type=int, metavar="RANK", help="the instructions that this rank executes instead")
    show.set_defaults(run=_show)

    prove = commands.add_parser("prove", help="prove by symbolic execution that Schedules compute what they should")
    prove.add_argument("op", metavar="OP", nargs="?", help="only this collective (default: all)")
    prove.add_argument("algorithm", metavar="ALGORITHM", nargs="?", help="only this algorithm (default: all)")
    prove.add_argument(
        "--ranks", type=_range, default=range(1, 17), metavar="A..B", help="world sizes (default: 1..16)"
    )
    prove.add_argument("--hosts", type=_hosts, metavar="H,H", help="the host of each rank instead, e.g. 0,0,1,1")
    prove.set_defaults(run=_prove)

    top = commands.add_parser("top", help="who is in which collective, since when, and who is missing")
    whose = top.add_mutually_exclusive_group()
    whose.add_argument("--pid", type=_pid, metavar="PID", help="only the groups of this process")
    whose.add_argument("--all", action="store_true", help="the groups of all processes of this user (default)")
    top.add_argument("--once", action="store_true", help="print once, not every second until Ctrl-C")
    top.add_argument("--json", action="store_true", help="one line of JSON each time")
    top.set_defaults(run=_top)

    stats = commands.add_parser("stats", help="what each rank's collectives did: calls, bytes, waiting and moving")
    stats.add_argument("folder", type=Path, metavar="FOLDER", help="what HXCOMM_STATS was for the program")
    stats.set_defaults(run=_stats)

    _add_tune(commands.add_parser("tune", help="measure which algorithms are fastest, and write a table of them"))
    _add_simulation(commands)
    _add_verify(
        commands.add_parser("verify", help="hold a torch.distributed backend against what the standard promises")
    )
    return parser


def _add_simulation(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """What needs a chip file, or makes one."""
    _add_chips(commands.add_parser("chips", help="the chips that can be simulated; of one, where each value is from"))
    measure = commands.add_parser(
        CHIPS_MEASURE,
        help="make a chip file of this machine from probes: ranks that share memory, each a core",
        description="Starts ranks on this host that measure what the machine allows, and writes a chip file of it.",
    )
    chip_arguments.add_to(measure)
    chip_arguments.add_ranks(measure)
    measure.set_defaults(run=_measure_chip)

    simulate = commands.add_parser("simulate", help="time a collective on simulated chips, by algorithm and size")
    simulate.description = "Nothing is run: each algorithm's Schedule is timed on the links of a chip file."
    simulate_arguments.add_to(simulate)
    simulate.set_defaults(run=_simulate)

    predict = commands.add_parser(
        "predict",
        help="milliseconds per token of a model on simulated chips, without weights",
        description="Records the model's code on tensors without memory, and times it by a chip file.",
    )
    predict_arguments.add_to(predict)
    predict.set_defaults(run=_predict)


def _add_tune(tune: argparse.ArgumentParser) -> None:
    tune.description = (
        "Writes a table for HXCOMM_TUNING. Starts ranks on this host that measure. On several hosts: torchrun ... -m "
        "hxcomm.tune --out FILE. With --chip nothing is measured: the table is that of a simulated chip's links."
    )
    tune.add_argument("--ranks", type=_count, required=True, metavar="N", help="world size; the table is for it only")
    tune_arguments.add_to(tune)
    tune.add_argument("--chip", metavar="NAME", help="simulate this chip (`hxcomm chips` lists them, or a .toml file)")
    simulate_arguments.add_links_to(tune)
    tune.set_defaults(run=_tune)


def _add_chips(chips: argparse.ArgumentParser) -> None:
    add = chips.add_argument
    add("chip", metavar="NAME_OR_PATH", nargs="?", help="explain this one: a name of the list, or a .toml of your own")
    add("--ranks", type=_count, default=8, metavar="N", help="how many of them are linked (default: 8)")
    add("--json", action="store_true", help="as JSON")
    chips.set_defaults(run=_chips)


def _add_verify(verify: argparse.ArgumentParser) -> None:
    verify.add_argument("--backend", default="hxcomm", metavar="NAME", help="any that torch knows (default: hxcomm)")
    verify.add_argument(
        "--api", choices=("c10d", "torchcomms"), default="c10d", help="torch.distributed (default), or a communicator"
    )
    verify.add_argument("--device", default="cpu", metavar="DEV", help="of the tensors: cpu (default), cuda, ...")
    verify.add_argument(
        "--ranks", type=_counts, default=[2, 3, 4], metavar="N,N", help="world sizes, one after another (2,3,4)"
    )
    verify.add_argument("--timeout", type=_seconds, default=20.0, metavar="S", help="limit of a check (default: 20)")
    verify.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="checks whose id matches, with * and ?; repeatable",
    )
    verify.add_argument(
        "--list", action="store_true", help="print the ids of the checks instead, and what they hold to"
    )
    verify.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module that registers the backend, or more checks; imported by every rank; repeatable",
    )
    verify.add_argument("--json", type=Path, metavar="FILE", help="write every result as JSON")
    verify.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page")
    verify.set_defaults(run=_verify)


def _pid(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a process")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of ranks, 1 or more")
    return int(text)


def _hosts(text: str) -> tuple[int, ...]:
    from hxcomm.schedule import ScheduleError
    from hxcomm.schedule.crossing import several

    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number for each rank: write it as 0,0,1,1")
    hosts = tuple(int(word) for word in words)
    try:
        several(hosts, len(hosts))
    except ScheduleError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return hosts


def _counts(text: str) -> list[int]:
    return sorted({_count(each) for each in text.split(",")})


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0.1 or more")
    return seconds


def _range(text: str) -> range:
    first, dots, last = text.partition("..")
    low, high = _count(first), _count(last if dots else first)
    if low > high:
        raise argparse.ArgumentTypeError(f"{text!r} is empty: write it as 1..16")
    return range(low, high + 1)


def _known(op: str | None, algorithm: str | None = None) -> list[tuple[str, str]]:
    """The (op, algorithm) pairs that these names stand for, None standing for all. Raises UsageError."""
    from hxcomm import algorithms

    if op is not None and op not in algorithms.OPS:
        raise UsageError(f"there is no op {op!r}; known are: {', '.join(algorithms.OPS)}")
    if op is not None and algorithm is not None and algorithm not in algorithms.names(op):
        raise UsageError(f"{op} has no algorithm {algorithm!r}; known are: {', '.join(algorithms.names(op))}")
    ops = algorithms.OPS if op is None else [op]
    return [(each, name) for each in ops for name in algorithms.names(each) if algorithm in (None, name)]


def _show(options: argparse.Namespace) -> int:
    from hxcomm import algorithms
    from hxcomm.schedule import compile_plan, draw

    _known(options.op, options.algorithm)
    root = ROOTED_AT if options.op in algorithms.ROOTED else None
    ranks = len(options.hosts or ()) or options.ranks
    schedule = algorithms.build(options.op, options.algorithm, ranks, root=root, hosts=options.hosts)
    if options.plan is None:
        print(draw.text(schedule, private=options.staged, hosts=options.hosts))
        return 0
    if options.plan not in range(ranks):
        raise UsageError(f"--plan {options.plan}: the ranks of world size {ranks} are 0..{ranks - 1}")
    print(draw.plan_text(compile_plan(schedule, options.plan, private=options.staged, hosts=options.hosts)))
    return 0


def _prove(options: argparse.Namespace) -> int:
    from hxcomm import algorithms
    from hxcomm.schedule import OPS, ProofError, ScheduleError, prove

    failures = 0
    for op, name in _known(options.op, options.algorithm):
        orders = set()
        proved = 0
        for world_size in [len(options.hosts)] if options.hosts else options.ranks:
            roots = sorted({ROOTED_AT, world_size - 1}) if op in algorithms.ROOTED else [None]
            for root in roots:
                where = f"{world_size} ranks" + ("" if root is None else f", root {root}")
                where += f", on hosts {','.join(map(str, options.hosts))}" if options.hosts else ""
                try:
                    proof = prove(algorithms.build(op, name, world_size, root, options.hosts), options.hosts)
                except (ProofError, ScheduleError) as error:
                    print(f"{op} {name}, {where}: WRONG: {error}")
                    failures += 1
                else:
                    proved += 1
                    orders.add("rank order" if proof.order == "rank order" else "an order of its own")
        how = f"; reduces in {' or '.join(sorted(orders, reverse=True))}" if OPS[op].reduces and proved else ""
        print(f"{op} {name}: {proved} proved{how}")
    return 1 if failures else 0


def _top(options: argparse.Namespace) -> int:
    from hxcomm import top

    return top.run(options.pid, as_json=options.json, once=options.once)


def _stats(options: argparse.Namespace) -> int:
    from hxcomm.stats import report

    try:
        print(report.run(options.folder))
    except report.ReportError as error:
        print(f"hxcomm stats: {error}", file=sys.stderr)
        return 1
    return 0


def _chips(options: argparse.Namespace) -> int:
    from hxcomm.sim import explain

    try:
        print(explain.run(options))
    except ValueError as error:  # ChipError, InterconnectError
        raise UsageError(str(error)) from error
    return 0


def _verify(options: argparse.Namespace) -> int:
    from hxcomm.verify import command

    try:
        return command.run(options)
    except command.UsageError as error:
        raise UsageError(str(error)) from error


def _simulate(options: argparse.Namespace) -> int:
    from hxcomm.bench import arguments
    from hxcomm.simulate import command

    try:
        return command.run(simulate_arguments.settings_of(options))
    except arguments.UsageError as error:
        raise UsageError(str(error)) from error


def _predict(options: argparse.Namespace) -> int:
    try:
        settings = predict_arguments.settings_of(options)
        from hxcomm.predict import command

        return command.run(settings)
    except predict_arguments.UsageError as error:
        raise UsageError(str(error)) from error


def _tune(options: argparse.Namespace) -> int:
    from hxcomm.bench import arguments

    if options.ranks < 2:
        raise UsageError("--ranks 1: there is nothing to choose for one rank")
    try:
        if options.chip is not None:
            from hxcomm.simulate import tuning

            return tuning.run(
                tune_arguments.settings_of(options), *simulate_arguments.network_of(options, options.ranks)
            )
        simulate_arguments.refuse_links(options)
        settings = tune_arguments.settings_of(options)
    except arguments.UsageError as error:
        raise UsageError(str(error)) from error
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    return subprocess.run([*torchrun, "-m", "hxcomm.tune", *settings.words()]).returncode


def _measure_chip(options: argparse.Namespace) -> int:
    from hxcomm.bench import arguments

    try:
        return chip_arguments.run(options)
    except arguments.UsageError as error:
        raise UsageError(str(error)) from error


def _info(options: argparse.Namespace) -> int:
    problem = build_check.problem()
    rows = [
        ("hxcomm", hxcomm.__version__),
        ("backend", _entry_point()),
        ("torch, built for", build_check.torch_built_for() or "not built"),
        ("torch, found", _torch_found()),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("libzmq", _libzmq()),
        ("kernels", _isa()),
        ("other hosts", _other_hosts()),
        ("device hx", _device()),
        ("cores", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"),
    ]
    _print_rows(rows)
    print("\nalgorithms")
    _print_rows(_algorithms())
    print("\nvariables")
    wrong = _print_variables()
    if problem:
        print(f"\n{problem}", file=sys.stderr)
    return 1 if problem or wrong else 0


def _print_rows(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def _entry_point() -> str:
    """Whether `import torch` finds the backend by itself."""
    if any(entry.name == "hxcomm" for entry in importlib.metadata.entry_points(group="torch.backends")):
        return "torch loads it by itself (entry point torch.backends)"
    return "torch does not know it: hxcomm is not installed here; pip install --no-build-isolation --editable ."


def _torch_found() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "not installed: pip install torch==2.13.0"


def _other_hosts() -> str:
    """How ranks on other hosts would reach a rank that is started from here."""
    from hxcomm import addresses, secret

    try:
        address = addresses.choose()
        mode = secret.load(loopback=address.is_loopback).mode
    except (ValueError, RuntimeError) as error:  # InitError among them
        return str(error).split(": make a secret")[0] + "; docs/launch.md"
    protected = {"none": "not protected", "curve": "protected by CURVE", "mac": "with authentication codes"}[mode]
    return f"reach this one at {address.text} ({address.interface}), {protected}"


def _libzmq() -> str:
    try:
        import zmq
    except ImportError as error:
        return f"not usable: {error}"
    return f"{zmq.zmq_version()} (pyzmq {zmq.__version__})"


def _isa() -> str:
    try:
        from hxcomm import _core
    except ImportError as error:
        return f"unknown: {error}"
    chosen = environment.ISA.text()
    if chosen is not None and chosen != "auto":
        try:
            _core.set_reduce_isa(environment.ISA.get())
        except ValueError as error:
            return f"unknown: {error}"
    return _core.reduce_isa()


def _device() -> str:
    """Asked of another process: it depends on what `import torch` finds, and this one imports no torch."""
    question = "import torch; from hxcomm.device import registration; print(registration.state())"
    try:
        done = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "unknown: `import torch` took more than 60 s"
    said = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return said[-1] if said else "unknown"


def _algorithms() -> list[tuple[str, str]]:
    pairs: dict[str, list[str]] = {}
    for op, name in _known(None):
        pairs.setdefault(op, []).append(name)
    return [(op, ", ".join(names)) for op, names in pairs.items()]


def _print_variables() -> bool:
    """Prints each variable with its value, and says whether one holds what it may not."""
    wrong = False
    for variable in environment.VARIABLES.values():
        text = variable.text()
        try:
            variable.get()
            shown = text or f"{variable.default_text()} (default)"
        except ValueError as error:
            wrong, shown = True, f"WRONG: {error}"
        print(f"  {variable.name} = {shown}  ({variable.type})\n      {variable.meaning}")
    environment.warn_about_unknown()
    return wrong


if __name__ == "__main__":
    sys.exit(main())
