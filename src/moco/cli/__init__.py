"""The command line: one thin typed function per verb; errors become one line and an exit code.

Heavy modules are imported inside the verbs, so that help and errors about flags appear at once.
"""

import os
import signal
import sys
from collections.abc import Sequence

from cyclopts import App, Parameter
from cyclopts.exceptions import CycloptsError

from moco.cli.console import log_to_stderr, say
from moco.cli.flags import error_line, normalise
from moco.cli.images import embed, explore, pack, search
from moco.cli.measure import evaluate, export, report
from moco.cli.train import doctor, pretrain, recipes


def _version() -> str:
    from moco.packages import version_of

    number = version_of("moco-ssl")
    return f"moco {number}" if number else "moco, not installed"


app = App(
    name="moco",
    help="Train an image encoder on unlabelled images, and measure how good it is.",
    help_epilogue="New here? `moco pretrain` trains on handwritten digits in about a minute.",
    version=_version,
    default_parameter=Parameter(name_transform=str, show_default=False, consume_multiple=True),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
for _verb in (pretrain, evaluate, embed, search, explore, report, export, pack, recipes, doctor):
    app.command(_verb)


def _leave(code: int) -> int:
    """After a failure, one of several processes leaves without what happens at exit, which could wait for the others.

    The others end once this one has gone: torchrun or srun sees to it, or they see it themselves (`end_with_first`).
    """
    dist = sys.modules.get("moco.parallel.collectives")
    if code and dist and dist.world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _report(error: Exception, code: int) -> int:
    if os.environ.get("MOCO_TRACEBACK") == "1":
        raise error
    say(f"moco: {error_line(error)}")
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; not given: those of the process.

    Returns:
        The exit code: 0; 2 if what was given is wrong; 1 after a failure; 128 + signal after a stop.
    """
    # A core that waits for another spins for some microseconds, then yields: without this limit, training beside other
    # programs stalls; with no spinning at all it takes half as long again (results/LOG.md). Set before torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    return _leave(_run(normalise(list(sys.argv[1:] if arguments is None else arguments))))


def _run(tokens: list[str]) -> int:
    with log_to_stderr():
        try:
            app(tokens, exit_on_error=False, print_error=False, verbose=False)
            sys.stdout.flush()
            return 0
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except KeyboardInterrupt:
            say("moco: stopped by SIGINT")
            return 128 + signal.SIGINT
        except BrokenPipeError:
            # The reader has gone (`moco recipes | head`): write nothing more, not even at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except (CycloptsError, ValueError, FileNotFoundError, FileExistsError) as error:
            return _report(error, 2)
        except (OSError, RuntimeError, MemoryError, ImportError) as error:
            return _report(error, 1)
