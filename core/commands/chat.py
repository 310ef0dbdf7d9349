"""`graphwright chat FOLDER`: talk to an artifact in the terminal."""

from __future__ import annotations

import random
import sys
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import ArgumentError, GraphwrightError

if TYPE_CHECKING:
    from graphwright.ir.generation.conversation import Conversation
    from graphwright.ir.generation.decode import Completion

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it; Ctrl-C stops an answer"


def chat(arguments: Any) -> int:
    """Runs the command: a turn per line of stdin, answers to stdout, all else to stderr.

    Args:
        arguments: `folder`, `system`, `plain`, `max_new_tokens`, `do_sample`, `temperature`,
            `top_k`, `top_p`, `min_p`, `repetition_penalty`, `seed`, `stop`, `threads`, `quiet`.

    Raises:
        GraphwrightError: the folder holds no artifact that can chat; where lines are piped in,
            also whatever a turn fails with.
    """
    start = time.perf_counter()
    conversation = _open(arguments)
    is_terminal = sys.stdin.isatty()
    if is_terminal and not arguments.quiet:
        _say(f"{arguments.folder}: loaded in {time.perf_counter() - start:.1f} s. {HELP}")
    turn = 0
    while (line := _read(is_terminal)) is not None:
        if line in ("/exit", "/quit"):
            break
        if line == "/reset":
            conversation.reset()
        elif line.startswith("/") and line.split()[0] == "/help":
            _say(HELP)
        elif line:
            _turn(conversation, line, _options(arguments, turn), arguments, is_terminal)
            turn += 1
    return 0


def _open(arguments: Any) -> Conversation:
    import torch

    from graphwright.backends.opening import open_artifact

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ArgumentError(f"--threads {arguments.threads} is not a number of threads")
        torch.set_num_threads(arguments.threads)
    if not Path(arguments.folder).exists():
        raise ArgumentError("no such file or folder", where=arguments.folder)
    compiled = open_artifact(Path(arguments.folder))
    if compiled is None:
        raise ArgumentError(
            "this is no artifact",
            where=arguments.folder,
            fix="Compile the model first: optimize MODEL --spec llm-int4 --out DIR.",
        )
    model = compiled.language_model
    if model.tokenizer is None:
        raise ArgumentError(
            "this artifact has no tokenizer, so it has no text interface",
            where=arguments.folder,
            fix="Put tokenizer.json and tokenizer_config.json into its folder.",
        )
    if not arguments.plain and model.tokenizer.template is None:
        raise ArgumentError(
            "this model has no chat template: it continues texts and answers nobody",
            where=arguments.folder,
            fix="Use --plain to continue texts.",
        )
    if arguments.plain and arguments.system is not None:
        raise ArgumentError("--system belongs to a chat, and --plain is none")
    conversation = model.conversation(arguments.system)
    model.settings(_options(arguments, 0))  # what is wrong with them is said before the first line
    return conversation


def _turn(
    conversation: Conversation,
    line: str,
    options: dict[str, Any],
    arguments: Any,
    is_terminal: bool,
) -> None:
    """One line in, one answer out."""
    try:
        answer = _answer(conversation, line, options, arguments.plain)
    except KeyboardInterrupt:
        if not is_terminal:
            raise
        print(flush=True)
        return
    except GraphwrightError as error:
        if not is_terminal:
            raise
        _say(_shown(str(error)))
        return
    print(flush=True)
    if not arguments.quiet:
        _say(_figures(answer))


def _answer(
    conversation: Conversation, line: str, options: dict[str, Any], is_plain: bool
) -> Completion:
    def put(text: str) -> None:
        print(_shown(text), end="", flush=True)

    if not is_plain:
        return conversation.say(line, streamer=put, **options)
    conversation.append(line)
    answer = conversation.generate(streamer=put, **options)
    assert not isinstance(answer, list)
    return answer


def _figures(answer: Completion) -> str:
    speed = answer.tokens_per_second
    parts = [
        f"{len(answer.ids)} tokens",
        *([] if speed is None else [f"{speed:.1f} tokens/s"]),
        f"first after {answer.first_seconds:.2f} s ({answer.run_tokens} of {answer.prompt_tokens} "
        "tokens of the conversation were new)",
    ]
    end = "" if answer.finish == "stop" else "; cut by --max-new-tokens or the context length"
    return f"[{', '.join(parts)}{end}]"


def _shown(text: str) -> str:
    """A text that a terminal shows and does not obey."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) != "Cc" else ascii(c)[1:-1] for c in text
    )


def _options(arguments: Any, turn: int) -> dict[str, Any]:
    """Options of a turn; each has random numbers of its own."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    options = {name: getattr(arguments, name) for name in names}
    options["do_sample"] = False if arguments.greedy else None
    options["stop"] = tuple(arguments.stop)
    first = random.randrange(2**31) if arguments.seed is None else arguments.seed
    options["seed"] = first + turn
    return options


def _read(is_terminal: bool) -> str | None:
    """The next line; None at the end of the input."""
    try:
        return input("> " if is_terminal else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        if not is_terminal:
            raise
        print(flush=True)
        return ""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
