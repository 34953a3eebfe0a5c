"""Configuration: files and the environment give options the defaults that a user wants (docs/configuration.md).

Highest first: the flag, the environment (`VEILMART_*`), `./veilmart.toml` or the file of `--config`, the user's `config.toml`, the market
that this home knows, the option's own default.  Every option of every command can be set, but for those in `NEVER`:

    [all]                      # whatever command has such an option
    market = "market.example:7443"
    [node]                     # commands of `veilmart node`
    population = "ward-3"
    [node.publish]             # one command
    epsilon = 0.5

A table or key that no command has is an error.  Functions receive plain arguments: nothing but the command line reads this.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from protocol.errors import UsageError

USER_FILE, PROJECT_FILE = "config.toml", "veilmart.toml"
EVERYWHERE = "all"  # the table for every command
# A secret never lies in a configuration, the network is never allowed in passing, and whoever parses JSON says so.
NEVER = frozenset({"allow-network", "config", "debug", "help", "install-completion", "invite", "json", "show-completion", "version"})

Words = tuple[str, ...]  # of a command, as ("node", "publish")


@dataclass(frozen=True, slots=True)
class Setting:
    """A default that somebody set, and where."""

    value: Any
    origin: str  # the file
    place: str  # in it, as find.top


Settings = dict[Words, dict[str, Setting]]  # by command and key


def commands_of(command: click.Command, words: Words = ()) -> Iterator[tuple[Words, click.Command]]:
    """Yield every command below one, with its words."""
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands_of(inner, (*words, name))
    else:
        yield words, command


def options_of(command: click.Command) -> dict[str, click.Option]:
    """Return the options of a command that can be configured, by their key: the long name without its dashes."""
    options = [option for option in command.params if isinstance(option, click.Option)]
    return {key: option for option in options if (key := key_of(option)) not in NEVER}


def key_of(option: click.Option) -> str:
    """Return the key of an option: its long name without the dashes."""
    return max(option.opts, key=len).lstrip("-")


def variable_of(words: Words, option: click.Option) -> str:
    """Return the environment variable of an option: the one that it names, or VEILMART_ with command and key."""
    if isinstance(option.envvar, str):
        return option.envvar
    return "_".join(("veilmart", *words, key_of(option))).replace("-", "_").upper()


def user_file(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where the user's configuration lies, or would: below VEILMART_HOME where that is set."""
    if home := environment.get("VEILMART_HOME"):
        return Path(home) / USER_FILE
    import platformdirs

    return platformdirs.user_config_path("veilmart") / USER_FILE


def files(explicit: Path | None = None) -> tuple[Path, ...]:
    """Return the files that are read, the lowest first.

    Raises UsageError for an explicit one that is not there, and for a `veilmart.toml` of somebody else: what lies in the current folder
    may come from anywhere, and decides what commands do.
    """
    found = [path for path in (user_file(),) if path.is_file()]
    if explicit is not None:
        if not explicit.is_file():
            raise UsageError(f"{explicit}: no such file", hint="`veilmart config path` names the files that are read without --config")
        return (*found, explicit)
    here = Path(PROJECT_FILE)
    if here.is_file():
        state = here.stat()
        if state.st_uid not in (os.geteuid(), 0) or state.st_mode & 0o002:
            raise UsageError(
                f"./{here}: expected a file that you own and others may not write",
                hint=f"it decides what commands do here: read it, then `--config {here}`, or `chown` and `chmod o-w` it",
            )
        found.append(here)
    return tuple(found)


def read(path: Path, root: click.Command) -> Settings:
    """Return what a file sets, by command and key; raise UsageError that names file and key for what no command has."""
    import tomllib

    try:
        tables = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected TOML: {error}", hint="`veilmart config show` has an example in its help") from None
    known = {words: options_of(command) for words, command in commands_of(root)}
    found: Settings = {}
    loose = [key for key, value in tables.items() if not isinstance(value, dict)]
    if loose:
        raise UsageError(f"{path}: {loose[0]}: expected a table", hint=f"[{EVERYWHERE}] is for every command, [find] for `veilmart find`")
    _take(tables.pop(EVERYWHERE, {}), (), EVERYWHERE, known, path, found)
    for name, table in tables.items():
        _take(table, (name,), name, known, path, found)
    return found


def _take(
    table: Mapping[str, Any], words: Words, place: str, known: Mapping[Words, Mapping[str, click.Option]], path: Path, found: Settings
) -> None:
    """Add what a table sets; what stands in the table of a command overrides what stands in one above it."""
    below = [command for command in known if command[: len(words)] == words]
    if not below:
        names = {command[: len(words)][-1] for command in known if command[: len(words) - 1] == words[:-1] and len(command) >= len(words)}
        raise UsageError(f"{path}: [{place}]: no such command", hint=_meant(words[-1], [*names, EVERYWHERE]))
    for key, value in table.items():
        if isinstance(value, dict):
            continue
        takers = [command for command in below if key in known[command]]
        if not takers:
            of = f"`veilmart {' '.join(words)}`" if words else "any command"
            raise UsageError(f"{path}: {place}.{key}: no option of {of}", hint=_meant(key, {key for one in below for key in known[one]}))
        for command in takers:
            setting = Setting(_accepted(value, known[command][key], path, f"{place}.{key}"), str(path), f"{place}.{key}")
            found.setdefault(command, {})[key] = setting
    for name, value in table.items():
        if isinstance(value, dict):
            if not words:
                raise UsageError(f"{path}: [{place}.{name}]: expected no table here", hint=f"[{name}] is for `veilmart {name}`")
            _take(value, (*words, name), f"{place}.{name}", known, path, found)


def _meant(word: str, known: Sequence[str] | set[str]) -> str:
    close = get_close_matches(word, sorted(known), 1)
    return f"did you mean {close[0]}?" if close else "`veilmart COMMAND --help` lists the options, without their dashes here"


def _accepted(value: Any, option: click.Option, path: Path, place: str) -> Any:
    """Return a value as the option takes it; raise UsageError for another kind."""
    if option.multiple != isinstance(value, list):
        raise UsageError(f"{path}: {place}: expected {'a list' if option.multiple else 'one value'}")
    if isinstance(value, list):
        return [_one(item, option, path, place) for item in value]
    return _one(value, option, path, place)


def _one(value: Any, option: click.Option, path: Path, place: str) -> Any:
    if option.is_flag != isinstance(value, bool) or not isinstance(value, bool | int | float | str):
        raise UsageError(f"{path}: {place}: expected {'true or false' if option.is_flag else option.type.name}")
    if isinstance(value, bool):
        return value
    if isinstance(option.type, click.Path):  # relative to the file that says so, wherever the command is given
        value = str(path.absolute().parent / Path(str(value)).expanduser())
    elif isinstance(option.type, click.types.StringParamType):
        value = str(value)
    try:
        option.type.convert(value, option, None)
    except click.BadParameter as error:
        raise UsageError(f"{path}: {place}: {error.message}") from None
    return value


def settings(root: click.Command, explicit: Path | None = None) -> Settings:
    """Return what the files set, the higher file over the lower one."""
    merged: Settings = {}
    for path in files(explicit):
        for words, found in read(path, root).items():
            merged.setdefault(words, {}).update(found)
    return merged


def defaults(
    root: click.Command, words: Words, command: click.Command, given: Mapping[str, object], explicit: Path | None
) -> dict[str, Setting]:
    """Return the defaults of one command, by key, from the files and the market that its home knows; given: its flags, by parameter."""
    options, found = options_of(command), settings(root, explicit).get(words, {})

    def said(key: str) -> Any:
        """Return what is said higher up than the home's own market."""
        flag, variable = given.get(options[key].name or key), os.environ.get(variable_of(words, options[key]))
        return flag or variable or (found[key].value if key in found else None)

    if "home" in options and {"market", "ca"} <= options.keys() and not (said("market") or said("ca")):
        # Neither is named: an address must never meet an authority that was not meant for it.
        from nodes.home import default_home
        from nodes.known_market import market_of

        known = market_of(Path(str(said("home") or default_home())))
        if known is not None:
            file = str(known.file)
            found = {
                **found, "market": Setting(known.address, file, "market.address"), "ca": Setting(str(known.authority), file, "market"),
            }  # fmt: skip
    return found
