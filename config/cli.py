"""The one command line of the trainer and the tools: `--config FILE` with overrides, and one sentence on an error."""

import contextlib
import difflib
import errno
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from config import base
from config.errors import MissingFileError, UserError, first_line

USER_ERROR = 2  # exit status after a mistake of the user, as that of bash and argparse; any other error gives 1
PATIENCE = 5  # seconds that a process waits for the first one of its machine to tell a mistake that both have found
PLACE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
)  # of a disk, not of the program

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
            raise UserError(f"{words[0]!r} is not a flag: flags are written --config.KEY=VALUE")
        main(args, *words)


def parse(
    arguments: Sequence[str], default_config: str, define_flags: Callable[[], None] | None = None
) -> tuple[flags.FlagValues, list[str]]:
    """The parsed flags of a command line (as sys.argv), and the words that are not flags.

    Raises UserError for a wrong flag or a configuration file that cannot be used.
    """
    check_flags(arguments)
    file, arguments = _config_first(arguments)
    try:
        description = "Configuration file, with :NAME for one of its runs."
        config_flags.DEFINE_config_file("config", default_config, description, sys_argv=arguments)
        if define_flags:
            define_flags()
        flags.FLAGS.set_gnu_getopt()  # flags may follow the words
        words = flags.FLAGS(arguments)[1:]
        flags.FLAGS.config.keys()  # what went wrong in a configuration file is raised on first use only
    except flags.Error as error:
        raise UserError(_reason(str(error), file or default_config)) from error
    except Exception as error:  # whatever the file, which may be the user's own, raised
        reason = _reason(f"{type(error).__name__}: {error}", file or default_config)
        raise UserError(reason) from error
    return flags.FLAGS, words


def _config_first(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The value of --config ("" without one), and the same command line with it before the --config.KEY flags, where
    config_flags wants it.

    Raises UserError if there are two, if it has no value, or if there is no such file."""
    arguments = list(arguments)
    flags_end = arguments.index("--") if "--" in arguments else len(arguments)
    places = [place for place in range(flags_end) if re.fullmatch(r"--?config(=.*)?", arguments[place], re.DOTALL)]
    if not places:
        return "", arguments
    if len(places) > 1:
        raise UserError("--config is given twice: give one, and change its keys with --config.KEY=VALUE")
    place = places[0]
    end = place + 1 if "=" in arguments[place] else place + 2
    value = arguments[place].partition("=")[2] if "=" in arguments[place] else "".join(arguments[place + 1 : end])
    if not value or value.startswith("-"):
        raise UserError("--config has no value: give a file such as config/tiny.py")
    file = value.split(":")[0]
    if not Path(file).is_file():
        found = "is a folder" if Path(file).is_dir() else "does not exist"
        raise MissingFileError(f"--config names {file!r}, which {found}: give a file such as config/tiny.py")
    return value, [arguments[0], *arguments[place:end], *arguments[1:place], *arguments[end:]]


def _reason(message: str, file: str) -> str:
    """The cause in one line, where absl and config_flags report a whole traceback as text."""
    errors = re.findall(r"^\s*(?:\w+\.)*(\w+(?:Error|Exception)): (.*)$", message, flags=re.MULTILINE)
    if errors:
        kind, cause = errors[-1]
        if kind == "UserError":
            return cause
        cause = cause.split(" Other fields present")[0].strip("'\"")
        return f"the configuration {file} cannot be used: {cause} (CARVE3D_DEBUG=1 shows where)"
    return first_line(" ".join(message.split())).removeprefix(
        "Configuration is not available because of an earlier failure to load: "
    )


@contextlib.contextmanager
def one_sentence(program: str) -> Iterator[None]:
    """Inside, a mistake of the user ends the program with "program: sentence" and exit status `USER_ERROR`.

    That is a `UserError`, or a disk that is full or may not be written. Any other error keeps its traceback, and with
    CARVE3D_DEBUG=1 in the environment these have theirs too. Of several processes that torchrun started on a machine
    one speaks, and the others, which stop for the same reason or because it has stopped, are silent.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get("CARVE3D_DEBUG"):
            raise
        said = _said_by_a_process()
        if isinstance(error, UserError) or getattr(error, "errno", None) in PLACE_ERRORS:
            if said is None or _is_first(said):
                sys.stderr.write(f"{program}: {error}\n")  # in one piece, though others may be writing too
                sys.stderr.flush()
            sys.exit(USER_ERROR)
        if said is not None and said.exists():
            sys.exit(USER_ERROR)
        raise


def _said_by_a_process() -> Path | None:
    """The file that exists once a process of this machine has spoken; None if torchrun did not start this process."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # one for each process, in a folder of its own
    return Path(error_file).parent.parent / "user_error" if error_file else None


def _is_first(said: Path) -> bool:
    """Whether this process is the one that creates the file `said`.

    The first process of a machine goes before the others, so that the sentence stands behind what it has printed; they
    wait for it, but not long, since it need not have found the mistake."""
    deadline = time.monotonic() + (0 if os.environ.get("LOCAL_RANK") == "0" else PATIENCE)
    while time.monotonic() < deadline and not said.exists():
        time.sleep(0.05)
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def check_flags(arguments: Sequence[str]) -> None:
    """Refuse `--config.KEY=VALUE` flags whose KEY does not exist, naming the nearest one that does, or whose VALUE is
    of another type.

    arguments: the command line, as sys.argv. Raises UserError, where absl's own error would not say what to write.
    """
    defaults = _keys(base.get_config())
    following = [*arguments[1:], ""]
    for argument, following_argument in zip(arguments, following, strict=True):
        if argument == "--":
            break
        flag = re.match(r"--?(no)?config\.([^=]+)(?:=(.*))?$", argument, flags=re.DOTALL)
        if flag is None:
            continue
        negated, key, value = flag.groups()
        if key not in defaults:
            raise UserError(_unknown_key(key, list(defaults)))
        if key == "per_prompt_stat_tracking" and value == "None":
            raise UserError(
                "--config.per_prompt_stat_tracking=None cannot be written on the command line: use "
                "--config.per_prompt_stat_tracking.buffer_size=0"
            )
        default = defaults[key]
        if value is None and isinstance(default, bool):
            continue
        if not negated:
            _check_type(key, default, following_argument if value is None else value)


def _check_type(key: str, default: object, text: str) -> None:
    """Raise UserError unless `text` can be a value of config.`key`, whose default is `default`."""
    if isinstance(default, ConfigDict):
        example = next(iter(default))
        raise UserError(f"config.{key} is a section: set its keys, such as --config.{key}.{example}={default[example]}")
    for kind, parser, wanted in (
        (bool, flags.BooleanParser(), "True or False"),  # before int, which it is too
        (int, flags.IntegerParser(), "a whole number"),
        (float, flags.FloatParser(), "a number"),
    ):
        if isinstance(default, kind):
            try:
                parser.parse(text)
            except (TypeError, ValueError):
                raise UserError(f"config.{key} is {text!r}: set it to {wanted}, such as {default}") from None
            return


def _keys(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """{dotted name: value} of all keys, sections included."""
    found = {}
    for key, value in config.items():
        found |= {prefix + key: value, **(_keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {})}
    return found


def _unknown_key(key: str, known: Sequence[str]) -> str:
    if key in PUBLISHED_NAMES:
        return f"config.{key} is a key of the published configuration that is not used here: {PUBLISHED_NAMES[key]}"
    leaf = key.split(".")[-1]

    def likeness(name):  # by the whole name or by its last part: train.lr_rate, but also plain learning_rate
        whole, last = _similarity(key, name), name.split(".")[-1]
        initials = "".join(word[0] for word in last.split("_")) == leaf  # lr
        return initials or max(whole, _similarity(leaf, last)), whole

    sections = {name.rpartition(".")[0] for name in known}
    nearest = max((name for name in known if name not in sections), key=likeness)
    return f"config.{key} does not exist: did you mean config.{nearest}? (config/base.py lists all keys)"


def _similarity(a: str, b: str) -> float:
    """0 to 1: how much of two names is the same letters in the same order."""
    return difflib.SequenceMatcher(None, a, b).ratio()
