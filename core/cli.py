"""The command line: `optimize` (the main job) and `graphwright` (the toolbox).

Nothing heavy is imported before it is known what is asked for, so that `--help` and the errors
of a spec answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from graphwright.ir.errors import GraphwrightError, printable
from graphwright.ir.lack import lacks_told

EXIT_STATUS = (
    "exit status: 0 done; 2 the spec or the arguments are wrong, or the machine lacks memory, disk "
    "space or a right for them; 3 the model cannot be loaded or "
    "traced; 4 a pass broke its contract or its error bound; 5 lowering failed or its result "
    "differs from the program; 6 a bound of `require` was missed"
)


def optimize_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `optimize MODEL --spec SPEC`."""
    parser = argparse.ArgumentParser(prog="optimize", epilog=EXIT_STATUS, allow_abbrev=False)
    _optimize_parser(parser)
    return _run(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `graphwright COMMAND ...`."""
    from graphwright import __version__

    parser = argparse.ArgumentParser(
        prog="graphwright",
        description="A declarative compiler for trained PyTorch models.",
        epilog=EXIT_STATUS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"graphwright {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (build, summary) in COMMANDS.items():
        build(commands.add_parser(name, help=summary, description=summary, allow_abbrev=False))
    return _run(parser, argv)


def _run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    arguments = parser.parse_args(argv)
    if getattr(arguments, "no_code", False) and getattr(arguments, "allow_pickle", False):
        parser.error("--no-code and --allow-pickle contradict each other")
    try:
        with lacks_told():
            status = arguments.do(arguments)
            sys.stdout.flush()
        return int(status or 0)
    except GraphwrightError as error:
        if arguments.debug:
            raise
        print(printable(f"{parser.prog}: error: {error}"), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output is gone (`| head`): nothing is left to say to anyone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            raise
        kind = type(error).__name__
        first = (str(error).strip().splitlines() or ["no message"])[0]
        print(
            f"{parser.prog}: internal error: {kind}: {first}\n"
            "    this is a bug in graphwright; run again with --debug for the traceback",
            file=sys.stderr,
        )
        return 1


def _common(parser: argparse.ArgumentParser, do: Callable[[Any], int | None]) -> None:
    parser.add_argument("--debug", action="store_true", help="show a traceback on errors")
    parser.set_defaults(do=do)


def _no_code(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-code",
        action="store_true",
        help="refuse a spec that names code to run (factory, data, metric or loss functions)",
    )


def _loading(parser: argparse.ArgumentParser) -> None:
    _no_code(parser)
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="open model files that can run code when they are loaded",
    )


def _optimize_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.description = "Compile a trained model by the passes and backends that a spec names."
    parser.add_argument("model", metavar="MODEL", help="model file or Hugging Face model folder")
    parser.add_argument("--spec", required=True, help="YAML file, or name of a ready-made spec")
    parser.add_argument(
        "--out", default="out", metavar="DIR", help="where results go (%(default)s)"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one value of the spec, as passes.1.sparsity=0.5; repeatable",
    )
    _loading(parser)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(%(default)s)")
    parser.add_argument(
        "--jobs", type=_jobs, default=1, metavar="N", help="parallel workers, or `ray` (1)"
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on after the last finished pass of a run that was killed",
    )
    parser.add_argument(
        "--plan", action="store_true",
        help="print each stage's estimated time, memory and disk; run and write nothing",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    _common(parser, _do_optimize)
    return parser


def _jobs(text: str) -> int | str:
    if text == "ray":
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor 'ray'")


def _do_optimize(arguments: argparse.Namespace) -> int:
    from graphwright.specs.spec import load_spec

    # First of all the spec, without torch: a typo is answered before anything is imported.
    spec = load_spec(arguments.spec, arguments.overrides)
    from graphwright.job.pipeline import JobSettings, run

    settings = JobSettings(
        out=arguments.out,
        allow_pickle=arguments.allow_pickle,
        no_code=arguments.no_code,
        device=arguments.device,
        jobs=arguments.jobs,
        resume=arguments.resume,
        quiet=arguments.quiet,
    )
    if arguments.plan:
        from graphwright.plan.job import plan

        plan(arguments.model, spec, settings)
        return 0
    run(arguments.model, spec, settings)
    return 0


def _build_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--spec", help="spec whose `model` section declares the inputs")
    parser.add_argument("--groups", action="store_true", help="list channel groups instead")
    parser.add_argument(
        "--svg", metavar="FILE", help="draw the graph into FILE; the groups with --groups"
    )
    parser.add_argument(
        "--level", choices=["module", "op"], default="module", help="of the drawing"
    )
    _loading(parser)
    _common(parser, _do_inspect)


def _do_inspect(arguments: argparse.Namespace) -> int:
    from graphwright.commands.inspect import inspect

    with _watched(arguments):
        return inspect(arguments)


def _watched(arguments: argparse.Namespace) -> AbstractContextManager[Any]:
    """The user's own code that a command runs is said on stderr."""
    from graphwright.ir.user_code import watched

    return watched(no_code=arguments.no_code, say=lambda text: print(text, file=sys.stderr))


def _build_passes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", nargs="?", metavar="ID", help="explain this pass")
    _common(parser, _do_passes)


def _do_passes(arguments: argparse.Namespace) -> int:
    from graphwright.specs.catalogue import explain_pass, list_passes

    print(explain_pass(arguments.id) if arguments.id else list_passes())
    return 0


def _build_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="SPEC")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    _no_code(parser)
    _common(parser, _do_check)


def _do_check(arguments: argparse.Namespace) -> int:
    from graphwright.job.rules import check_rules
    from graphwright.specs.code import refuse_code
    from graphwright.specs.spec import load_spec

    spec = load_spec(arguments.spec, arguments.overrides)
    if arguments.no_code:
        refuse_code(spec)
    check_rules(spec)
    chain = " -> ".join([call.id for call in spec.passes] + [call.id for call in spec.lower])
    for name, part in spec.parts.items():
        chain += f"; {name}: " + (" -> ".join(call.id for call in part.passes) or "no passes")
    print(f"{arguments.spec}: ok: {chain}")
    return 0


def _build_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="A", help="model, program or artifact")
    parser.add_argument("candidate", metavar="B")
    parser.add_argument("--data", metavar="FILE", help="inputs; synthetic when absent")
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--spec", help="spec whose `model` section declares the inputs")
    _loading(parser)
    _common(parser, _do_compare)


def _do_compare(arguments: argparse.Namespace) -> int:
    from graphwright.commands.compare import compare

    with _watched(arguments):
        return compare(arguments)


def _build_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT")
    parser.add_argument("--spec", help="spec whose `model` section declares the inputs")
    parser.add_argument("--seconds", type=float, default=5.0, help="time to spend (%(default)s)")
    parser.add_argument("--threads", type=int, default=None)
    _loading(parser)
    _common(parser, _do_bench)


def _do_bench(arguments: argparse.Namespace) -> int:
    from graphwright.commands.bench import bench

    with _watched(arguments):
        return bench(arguments)


def _build_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="artifact of a language model")
    parser.add_argument("--system", metavar="TEXT", help="the system's message of the chat")
    parser.add_argument(
        "--plain", action="store_true", help="continue texts, without a chat template"
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="per answer (512)")
    parser.add_argument("--greedy", action="store_true", help="take the most probable tokens")
    parser.add_argument("--temperature", type=float, metavar="T")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--min-p", type=float, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, metavar="F")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of the samples; another one each time when absent"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends an answer; repeatable"
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--quiet", action="store_true", help="print answers only")
    _common(parser, _do_chat)


def _do_chat(arguments: argparse.Namespace) -> int:
    from graphwright.commands.chat import chat

    return chat(arguments)


def _build_schema(parser: argparse.ArgumentParser) -> None:
    _common(parser, _do_schema)


def _do_schema(arguments: argparse.Namespace) -> int:
    from graphwright.specs.catalogue import schema_json

    print(schema_json())
    return 0


def _build_optimize(parser: argparse.ArgumentParser) -> None:
    _optimize_parser(parser)


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "optimize": (_build_optimize, "compile a model by a spec"),
    "inspect": (_build_inspect, "print a model's layers; draw its graph"),
    "passes": (_build_passes, "list the passes, or explain one"),
    "check": (_build_check, "check a spec without opening a model"),
    "compare": (_build_compare, "how far two models or artifacts are apart"),
    "bench": (_build_bench, "time artifacts in alternation"),
    "chat": (_build_chat, "talk to a language model"),
    "schema": (_build_schema, "print the JSON schema of specs, for editors"),
}
