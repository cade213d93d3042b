"""The one command line of the trainer and the tools: `--config FILE` with overrides, and one sentence on an error."""

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from config import base

# Keys of the published configurations that have another name here, or that nothing needs any more.
PUBLISHED_NAMES = {
    "kl_log": "use config.log_kl",
    "bbox_lpips": "use config.mrc.bbox_lpips",
    "lora_rank": "use config.lora.rank",
    "train_size": "use config.prompts.num_train",
    "prompt_fn": "name the prompt files in config.prompts.train_file, val_file and test_file",
    "prompt_fn_kwargs": "name the prompt files in config.prompts.train_file, val_file and test_file",
    "curate_low_reward_prompts": "run python -m tools.curate_prompts and set config.prompts.train_file to its kept.txt",
    "num_nodes": "leave it out: the number of processes is the launcher's",
    "num_views": "leave it out: the painter says how many views it paints",
}


def run(
    program: str,
    main: Callable,
    default_config: str,
    define_flags: Callable[[], None] | None = None,
    takes_words: bool = False,
) -> None:
    """Parse sys.argv and call `main(args)`, where args.config is the configuration.

    program: the name that error messages begin with. default_config: the file used where --config is not given.
    define_flags: defines further absl flags, which become further attributes of args.
    takes_words: call `main(args, *words)` with the arguments that are not flags; otherwise there must be none.
    --help prints the docstring of the program.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(sys.modules["__main__"].__doc__.strip())
        return
    with one_sentence(program):
        args, words = parse(sys.argv, default_config, define_flags)
        if words and not takes_words:
            raise ValueError(f"{words[0]!r} is not a flag: flags are written --config.KEY=VALUE")
        main(args, *words)


def parse(
    arguments: Sequence[str], default_config: str, define_flags: Callable[[], None] | None = None
) -> tuple[flags.FlagValues, list[str]]:
    """The parsed flags of a command line (as sys.argv), and the words that are not flags.

    Raises ValueError with one sentence for a wrong flag or a configuration file that cannot be used.
    """
    check_flags(arguments)
    arguments = _config_first(arguments)
    try:
        description = "Configuration file, with :NAME for one of its runs."
        config_flags.DEFINE_config_file("config", default_config, description, sys_argv=arguments)
        if define_flags:
            define_flags()
        flags.FLAGS.set_gnu_getopt()  # flags may follow the words
        words = flags.FLAGS(arguments)[1:]
        flags.FLAGS.config.keys()  # what went wrong in a configuration file is raised on first use only
    except (OSError, flags.Error) as error:
        raise ValueError(_reason(str(error))) from error
    except AttributeError as error:  # a locked configuration got an unknown key
        raise ValueError(_reason(f"AttributeError: {error}")) from error
    return flags.FLAGS, words


def _config_first(arguments: Sequence[str]) -> list[str]:
    """The same command line with --config before the --config.KEY flags, where config_flags wants it."""
    arguments = list(arguments)
    for place, argument in enumerate(arguments):
        if re.fullmatch(r"--?config(=.*)?", argument, flags=re.DOTALL):
            end = place + 1 if "=" in argument else place + 2
            return [arguments[0], *arguments[place:end], *arguments[1:place], *arguments[end:]]
    return arguments


def _reason(message: str) -> str:
    """The cause in one line, where absl and config_flags report a whole traceback as text."""
    errors = re.findall(r"^\s*\w+Error: (.*)$", message, flags=re.MULTILINE)
    if errors:
        cause = errors[-1].split(" Other fields present")[0].strip("'\"")
        return f"the configuration file cannot be used: {cause} (CARVE3D_DEBUG=1 shows where)"
    missing = re.search(r"No such file or directory: '(.*)'", message)
    if missing:
        return f"--config names {missing[1]!r}, which does not exist: give a file such as config/tiny.py"
    return " ".join(message.split()).removeprefix(
        "Configuration is not available because of an earlier failure to load: "
    )


@contextlib.contextmanager
def one_sentence(program: str) -> Iterator[None]:
    """Inside, an error that a user can fix ends the program with "program: sentence" and exit status 1.

    CARVE3D_DEBUG=1 in the environment shows the whole traceback instead.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("CARVE3D_DEBUG"):
            raise
        sys.exit(f"{program}: {' '.join(str(error).split())}")  # those of libraries may have several lines


def check_flags(arguments: Sequence[str]) -> None:
    """Refuse `--config.KEY` flags whose KEY does not exist, naming the nearest one that does.

    arguments: the command line, as sys.argv. Raises ValueError, where absl's own error would name no alternative.
    """
    known = _keys(base.get_config())
    for argument in arguments:
        flag = re.match(r"--?(?:no)?config\.([^=]+)(?:=(.*))?$", argument, flags=re.DOTALL)
        if flag is None:
            continue
        key, value = flag.groups()
        if key not in known:
            raise ValueError(_unknown_key(key, known))
        if key == "per_prompt_stat_tracking" and value == "None":
            raise ValueError(
                "--config.per_prompt_stat_tracking=None cannot be written on the command line: use "
                "--config.per_prompt_stat_tracking.buffer_size=0"
            )


def _keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """All keys under their dotted names, sections included."""
    found = []
    for key, value in config.items():
        found += [prefix + key, *(_keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [])]
    return found


def _unknown_key(key: str, known: Sequence[str]) -> str:
    if key in PUBLISHED_NAMES:
        return f"config.{key} is a key of the published configuration that is not used here: {PUBLISHED_NAMES[key]}"
    leaf = key.split(".")[-1]

    def likeness(name):  # by the whole name or by its last part: train.lr_rate, but also plain learning_rate
        whole = _similarity(key, name)
        return max(whole, _similarity(leaf, name.split(".")[-1])), whole

    sections = {name.rpartition(".")[0] for name in known}
    nearest = max((name for name in known if name not in sections), key=likeness)
    return f"config.{key} does not exist: did you mean config.{nearest}? (config/base.py lists all keys)"


def _similarity(a: str, b: str) -> float:
    """0 to 1: how much of two names is the same letters in the same order."""
    return difflib.SequenceMatcher(None, a, b).ratio()
