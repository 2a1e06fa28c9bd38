"""The configuration of a run: composed by Hydra from conf/ and the command line, then checked.

A user's mistake, whether Hydra finds it or we do, ends before anything is built. conf/overrides.py
reads what is typed, conf/usage.py writes the help."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import hydra
from omegaconf import DictConfig, OmegaConf

from conf.cli import expanded, user_errors
from conf.composition import composed, defaults, name_files
from conf.key import check_value
from conf.keys import KEYS, is_read, lookup
from conf.overrides import (
    CONF,
    asks_for_help,
    check_overrides,
    for_hydra,
    no_such_option,
)
from conf.schema import Config
from conf.usage import run_help
from launch.config.checks import check_contradictions, check_given_names, check_names
from launch.config.plugins import register


def main(run: Callable[[Config], int]) -> None:
    """Calls `run` with the configuration that the command line asks for; exits with what it
    returns."""
    # Hydra raises its errors to us, instead of printing a traceback of its own.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    register()

    @hydra.main(version_base="1.3", config_path=CONF, config_name="config")
    def job(composed: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig

        # Here too: Hydra would print a line of its own about an exception that it sees.
        with user_errors():
            config = check(composed, list(HydraConfig.get().overrides.task))
            code = run(config)
        if code:
            sys.exit(code)

    # Hydra's application is for options, -m above all; one run is composed without it.
    arguments = sys.argv[1:]
    with user_errors():
        if asks_for_help(arguments):
            print(run_help(defaults()))
            sys.exit(0)
        if any(argument.startswith("-") for argument in arguments):
            sys.argv[1:] = for_hydra_application(arguments)
            job()
        else:
            config = compose(arguments)
            if config.print_only:
                raise ValueError(
                    "print_only=true is for sweeps, python train.py -m ...; use plan_only=true for"
                    " one run"
                )
            sys.exit(run(config))


def for_hydra_application(arguments: list[str]) -> list[str]:
    """Returns a command line with options as Hydra's application takes it: options first, and
    checked overrides in its grammar."""
    from hydra._internal.utils import get_args_parser

    if hasattr(argparse.ArgumentParser, "_check_help"):
        # Python 3.14 refuses help that is no string, as Hydra's of --shell-completion is.
        vars_of_parser: Any = argparse.ArgumentParser
        vars_of_parser._check_help = lambda _parser, _action: None
    parser = get_args_parser()
    known = [option for action in parser._actions for option in action.option_strings]

    # In place of argparse's error, which prints the usage of Hydra.
    def refuse(message: str) -> NoReturn:
        unknown = next(
            (
                text
                for text in arguments
                if text.startswith("-") and text.partition("=")[0] not in known
            ),
            None,
        )
        raise ValueError(
            no_such_option(unknown, known) if unknown else f"{message}; --help lists what there is"
        )

    vars(parser)["error"] = refuse
    # Options may stand anywhere between overrides.
    given = parser.parse_intermixed_args(arguments)
    if given.shell_completion or given.hydra_help:
        return arguments
    check_overrides(given.overrides, given.multirun)
    options = [argument for argument in arguments if argument not in given.overrides]
    return [*options, *(for_hydra(override, given.multirun) for override in given.overrides)]


def compose(overrides: list[str]) -> Config:
    """Returns the checked configuration of a list of overrides, without Hydra's application around
    it.

    Raises a HydraException, an OmegaConfBaseException or a ValueError for a user's mistake (see
    `user_errors`)."""
    check_overrides(overrides)
    return check(composed(overrides), overrides)


def check(composed: DictConfig, overrides: list[str]) -> Config:
    """Returns the typed configuration of a composed one. Raises ValueError for a value out of range
    or a contradiction, and notes once which of the given keys the chosen method does not read."""
    config: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
    name_files(config.data)
    if config.tokenizer.name == "hf" and config.tokenizer.path is None:
        config.tokenizer.path = config.init.hf
    for name, entry in KEYS.items():
        value = lookup(config, name)
        check_value(name, value, entry.metadata)
        # A default is expanded where it is used: who reads the run may have another home.
        if "path" in entry.metadata and value != entry.default:
            *section, last = name.split(".")
            vars(lookup(config, ".".join(section)) if section else config)[last] = expanded(
                name, value
            )
    for name, source in config.data.sources.items():
        check_value(f"data.sources.{name}.path", source.path, {})
        source.path = expanded(f"data.sources.{name}.path", source.path)
    check_names(config)
    check_given_names(overrides)
    check_contradictions(config)
    # What was typed and is not read may be a mistake; what a file sets is its author's business.
    given = [re.split("[=@]", override.lstrip("+~"))[0] for override in overrides]
    if idle := [name for name in given if name in KEYS and not is_read(config, name)]:
        print(
            f"note: not read by this run, so left out of its name and identity: {', '.join(idle)}",
            file=sys.stderr,
        )
    return config
