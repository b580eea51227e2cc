"""The command line of every script: a dataclass of options in, `--help` and errors of one line out."""

import os
import re
import shutil
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from lit_model.files import read_yaml

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the string below a dataclass field is its help


ROOT = Path(__file__).resolve().parents[1]


def _end(message: object) -> NoReturn:
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0":
        # the first process most likely says the same, and takes us with it
        stderr, sys.stderr = sys.stderr, open(os.devnull, "w")
        time.sleep(5)
        sys.stderr = stderr
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(message).split()))  # it may quote a file
    print(f"error: {line if len(line) <= 600 else f'{line[:400]} ... {line[-190:]}'}", file=sys.stderr)
    sys.exit(2)


class _Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the lines of a docstring as they are: some are commands. Shows neither types nor absolute paths."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=min(shutil.get_terminal_size((120, 24)).columns, 120))

    def add_arguments(self, actions: Any) -> None:
        hidden = ("Path to a configuration file.", "Show this help message and exit.")
        super().add_arguments([a for a in actions if a.help not in hidden and a.dest != "print_config"])

    def _format_action_invocation(self, action: Any) -> str:
        return action.option_strings[-1]

    def _expand_help(self, action: Any) -> str:
        default = getattr(action, "default", None)
        if default is None or default == "==SUPPRESS==" or action.dest == "config":
            return action.help
        default = str(default).lower() if isinstance(default, bool) else str(default).replace(f"{ROOT}/", "")
        choices = f"{default} of {action.metavar}" if str(action.metavar).startswith("{") else default
        return f"{action.help} [{choices}]" if default else action.help


class _Parser(ArgumentParser):
    configs: Sequence[str] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        also = f", and {', '.join(self.configs)}" if self.configs else ""
        _end(f"{_plain(message, list(self._option_string_actions))} (see --help{also})")


_KINDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "Path": "a path", "str": "a text"}


def _plain(message: str, options: list[str]) -> str:
    """jsonargparse's message in words of the command line; of an unknown option the nearest one."""
    message = " ".join(message.split())
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        name = found[1].split("=")[0]
        longer = [option for option in options if option.endswith(f".{name.lstrip('-')}")]
        near = longer or get_close_matches(name, options, 1)
        return f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else "")
    if found := re.match(r'Parser key "([^"]+)": (.*?)(?: Given value type: .*)? (?:Got|Given) value: (.*)', message):
        name, expected, value = found.groups()
        kinds = [_KINDS[kind] for kind in re.findall(r"<class '(?:\w+\.)*(\w+)'>", expected) if kind in _KINDS]
        kinds += [f"one of {names}".replace("'", "") for names in re.findall(r"Literal\[(.*?)\]", expected)]
        return f"--{name} is {value!r}; it must be {' or '.join(dict.fromkeys(kinds)) or expected}"
    return message


def cli(main: Callable[[Any], None], options_class: type, description: str, positional: tuple[str, ...] = ()) -> None:
    """Calls main(options) with an `options_class` made from sys.argv and, with --config, from a YAML file.

    A mistake of the user (an unknown option, a missing file, a bad value) ends in one line on stderr and exit code 2.
    Set LIT_TRACEBACK=1 to see where it came from.

    Args:
        description: the first lines of --help, usually the script's docstring.
        positional: fields that may be given as leading positional arguments.
    """
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a character shows another one, and ends nothing
            stream.reconfigure(errors="replace")
    parser = _Parser(description=description, usage="%(prog)s [options]", formatter_class=_Formatter)
    about = "a YAML file of options, such as a run's hparams.yaml; options on the command line override it"
    parser.add_argument("--config", action="config", help=about)
    if options_class.__doc__.startswith("Options("):  # it has none, and dataclass has put its signature there
        options_class.__doc__ = "Options."  # the heading in --help
    parser.add_class_arguments(options_class)
    args = sys.argv[1:]
    for i, name in enumerate(positional):
        if len(args) <= i or args[i].startswith("-"):
            break
        args[i] = f"--{name}={args[i]}"
    flags = {name for name, action in parser._option_string_actions.items() if action.metavar == "{true,false}"}
    for i, arg in reversed([*enumerate(args)]):
        if arg == "--config" and i + 1 < len(args):
            args[i : i + 2] = [f"--config={args[i + 1]}"]
        elif arg in flags and (i + 1 == len(args) or args[i + 1].startswith("-")):  # `--overwrite` alone
            args[i] = f"{arg}=true"
    args.sort(key=lambda arg: not arg.startswith("--config="))  # the other options count wherever they stand
    parser.configs = [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]
    try:
        for path in parser.configs:
            content = read_yaml(Path(path))
            for name in (f.name for f in fields(options_class) if is_dataclass(f.type)):
                group = content.get(name, {})  # a text would name a file, a class_path be imported
                if not isinstance(group, dict) or "class_path" in group:
                    raise ValueError(f"{path}: {name} holds no options by name")
        values = vars(parser.instantiate(parser.parse_args(args)))
        main(options_class(**{f.name: values[f.name] for f in fields(options_class)}))
    except (ValueError, OSError) as e:
        if os.environ.get("LIT_TRACEBACK"):
            raise
        _end(e)
    except (torch.OutOfMemoryError, MemoryError) as e:
        _end(f"out of memory: lower --train.row_tokens or --examples.max_length, or take a smaller network ({e})")
    except KeyboardInterrupt:
        sys.exit(130)
