"""The command line: fsdp-qlora COMMAND --name value ..., made from the settings dataclasses of config.py."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fire
from fire.decorators import SetParseFn

from fsdp_qlora import __version__, config
from fsdp_qlora.errors import ConfigError, FsdpQloraError, report
from fsdp_qlora.settings import Setting, describe, show, suggest


@dataclass(frozen=True)
class Command:
    """One command: `run(settings)` of the module of its name in commands/, with the settings read from the command line."""

    name: str
    summary: str
    settings: type
    positional: str = ""
    """The setting whose values may stand without their flag, separated by spaces."""


COMMANDS = (
    Command("train", "Fine-tune a model; under torchrun on several GPUs.", config.TrainConfig),
    Command("plan", "Say whether a run fits, before anything is downloaded.", config.PlanConfig),
    Command("data", "Show what training would learn from a dataset.", config.DataConfig),
    Command("doctor", "Say what would be slow or fail on this machine, and what to do.", config.DoctorConfig),
    Command("quantize", "Make a 4-bit checkpoint of a model, matrix by matrix.", config.QuantizeConfig),
    Command("initialize", "Make an adapter to start from out of the base: PiSSA or LoftQ.", config.InitializeConfig),
    Command("report", "Make a page of one or several training runs.", config.ReportConfig, "runs"),
    Command("merge", "Add an adapter to its base, matrix by matrix.", config.MergeConfig),
    Command("evaluate", "Measure an adapter, or a model, on a dataset.", config.EvaluateConfig),
    Command("push", "Publish an adapter or a model on the hub.", config.PushConfig),
    Command("generate", "Answer a prompt with a trained adapter, or a model.", config.GenerateConfig),
)

_HELP = ("--help", "-h")

ENVIRONMENT = {
    # freed GPU memory of one size serves requests of another: fewer out-of-memory errors near the limit
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # torch.compile starts a process for every core otherwise, on every rank, and each takes RAM of its own
    "TORCHINDUCTOR_COMPILE_THREADS": "4",
}
"""Defaults of variables that torch reads when it is imported; what the user has set stays."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; ends the process with exit code 2 for wrong settings, 1 for other errors, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.formatwarning = _format_warning
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        _dispatch(arguments)
    except FsdpQloraError as error:
        report(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return our own warnings as lines that begin as errors do; those of other packages with their place."""
    is_own = Path(filename).is_relative_to(Path(__file__).parent)
    return f"warning: {message}\n" if is_own else f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _dispatch(arguments: list[str]) -> None:
    """Answer requests for help and version; hand everything else to the command through fire."""
    commands = {command.name: command for command in COMMANDS}
    if arguments and arguments[0] == "--version":
        print(f"fsdp-qlora {__version__}")
        return
    if arguments and arguments[0] == "help":
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in _HELP:
        print(overview())
        return
    name, *rest = arguments
    if name not in commands:
        hint = suggest(name, list(commands), f"commands are {', '.join(commands)}")
        raise ConfigError(f"{name}: unknown command; {hint}")
    command = commands[name]
    if any(argument in _HELP for argument in rest):
        print(command_help(command))
        return
    flags, problems = read_flags(command, rest)
    fire.Fire(_component(command, problems), command=flags, name=f"fsdp-qlora {name}")


def _component(command: Command, problems: list[str]) -> object:
    """Make the function that fire calls; every value arrives as a raw string, to be read by its setting's type."""

    def run(config: str | None = None, **overrides: str) -> None:
        _run(command, overrides, config, problems)

    return SetParseFn(str)(run)


def _run(command: Command, overrides: dict[str, str], config_file: str | None, problems: list[str]) -> None:
    """Check everything, report all problems at once, then run the command.

    fire rejects unknown flags only after it has called the function, so they are caught here.
    """
    try:
        settings: object = config.parse(overrides, config_file, command.settings)
    except ConfigError as error:
        raise ConfigError("\n".join([*problems, str(error)])) from error
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        importlib.import_module(f"fsdp_qlora.commands.{command.name}").run(settings)
    except FsdpQloraError as error:
        report(error, debug=getattr(settings, "debug", False))
        raise


def read_flags(command: Command, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Write every flag as --name=value, so that fire guesses nothing; return the flags and the problems found.

    A boolean --flag without value is true, --noflag is false.
    """
    kinds: dict[str, type] = {setting.name: setting.kind for setting in describe(command.settings)}
    flags, problems, values = [], [], []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name = argument[2:].replace("-", "_")
        if command.positional and not argument.startswith("-"):
            values.append(argument)
        elif not argument.startswith("--") or not name:
            problems.append(f"{argument!r} belongs to no setting; write --name value")
        elif "=" in argument:
            flags.append(argument)
        elif rest and not rest[0].startswith("--"):
            flags.append(f"{argument}={rest.pop(0)}")
        elif kinds.get(name) is bool:
            flags.append(f"{argument}=true")
        elif name not in kinds and name.startswith("no") and kinds.get(name[2:].lstrip("_")) is bool:
            flags.append(f"--{name[2:].lstrip('_')}=false")
        elif name in kinds or name == "config":
            problems.append(f"{argument} has no value; write {argument} value")
        else:
            flags.append(f"{argument}=")  # unknown: reported with all other unknown names
    if values:
        flags.append(f"--{command.positional}={','.join(values)}")
    return flags, problems


def overview() -> str:
    """Return the help of the program: its commands."""
    width = max(len(command.name) for command in COMMANDS)
    lines = [f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS]
    return "\n".join(
        [
            "usage: fsdp-qlora COMMAND [--name value ...]",
            "",
            *lines,
            "",
            "fsdp-qlora COMMAND --help lists a command's settings; fsdp-qlora --version prints the version.",
        ]
    )


def command_help(command: Command) -> str:
    """Return the help of one command, wrapped to the terminal: every setting with type, default and documentation."""
    values = f" {command.positional.removesuffix('s').upper()} ..." if command.positional else ""
    lines = [f"usage: fsdp-qlora {command.name}{values} [--config FILE] [--name value ...]", "", command.summary, ""]
    lines += ["  --config FILE", *_wrap("YAML file of 'name: value' lines; settings on the command line win over it.")]
    section = ""
    for setting in describe(command.settings):
        if setting.section != section:
            section = setting.section
            lines += ["", section]
        default = "required" if setting.required else f"default: {show(setting.default)}"
        lines += [f"  --{setting.name} {_metavar(setting)}  ({default})", *_wrap(setting.doc)]
    return "\n".join(lines)


def _metavar(setting: Setting) -> str:
    if setting.choices:
        return "|".join(setting.choices)
    return {bool: "true|false", int: "N", float: "X", str: "TEXT"}[setting.kind]


def _wrap(text: str) -> list[str]:
    width = max(40, min(120, shutil.get_terminal_size().columns))
    return textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
