"""The command line. Exit codes: 0 pass, 1 mismatch, 2 usage or something missing.

Nothing heavy is imported here or at the top of a command's module, so `--help` needs neither torch nor a GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from mxharness import __version__
from mxharness.commands import common
from mxharness.commands.baseline import baseline
from mxharness.commands.bench import bench
from mxharness.commands.diverge import diverge
from mxharness.commands.evaluate import evaluate
from mxharness.commands.faults import faults, mutants
from mxharness.commands.fetch import fetch
from mxharness.commands.gate import gate
from mxharness.commands.generate import generate
from mxharness.commands.look import info, list_
from mxharness.commands.manifest import manifest
from mxharness.commands.merge import merge
from mxharness.commands.perplexity import perplexity
from mxharness.commands.probe import probe
from mxharness.commands.quantize import quantize
from mxharness.commands.replay import replay
from mxharness.commands.report import report
from mxharness.commands.run import run
from mxharness.commands.sanitize import sanitize
from mxharness.commands.sensitivity import sensitivity
from mxharness.errors import UserError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="mxharness")
def commands() -> None:
    """Numerical validation and regression harness for MXFP4 kernels.

    `mxharness run` validates every kernel on the best device present and writes a report. Each command takes
    --json. Exit codes: 0 pass, 1 mismatch, 2 usage or something missing.
    """


for command in (
    run,
    list_,
    info,
    fetch,
    perplexity,
    gate,
    quantize,
    generate,
    evaluate,
    baseline,
    bench,
    faults,
    mutants,
    probe,
    replay,
    report,
    manifest,
    merge,
    sanitize,
    sensitivity,
    diverge,
):
    commands.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with `arguments` (default: the process's own) and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    as_json = "--json" in arguments  # looked up here because a parse error comes before the option's value is known
    code = common.USAGE
    try:
        code = commands.main(args=arguments, prog_name="mxharness", standalone_mode=False)
    except click.ClickException as error:
        if as_json:
            common.print_json({"error": error.format_message()})
        else:
            error.show()
    except (UserError, ModuleNotFoundError) as error:
        _say(str(error) if isinstance(error, UserError) else common.missing_package(error), as_json)
    except BrokenPipeError:  # the reader of our output has gone, `| head` for one; Python would complain once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a cache folder that cannot be written
        _say(common.file_error(error), as_json)
    except click.Abort:
        _say("interrupted", as_json)
        code = 130
    _leave(code)


def _leave(code: int) -> None:
    """Exit; at once where a kernel hangs on a GPU, as everything that ends a process in good order waits for it."""
    cuda = sys.modules.get("mxharness.device.cuda")
    if cuda is not None and cuda.hangs():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _say(message: str, as_json: bool) -> None:
    if as_json:
        common.print_json({"error": message})
    else:
        click.echo(f"mxharness: {message}", err=True)
