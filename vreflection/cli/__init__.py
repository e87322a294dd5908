"""`vreflection` on the command line: one file per command, no logic of their own.

Exit codes: 0 done, 1 failed or interrupted (what was finished is kept), 2 bad input.
"""

from __future__ import annotations

import sys

HELP = """Latent visual reasoning: train, decode, evaluate, look and serve.

Exit codes: 0 done, 1 failed or interrupted (what was finished is kept), 2 bad input.
"""


def main() -> None:
    """Entry point."""
    import typer

    from ..errors import CheckpointError, ConfigError, DataError, TrainingError
    from . import ablate, bench, convert, data, eval, info, quickstart, serve, train, visualize

    # Without markup: square brackets in help texts, as of extras and defaults, are no tags.
    app = typer.Typer(
        no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=HELP
    )
    app.command("quickstart")(quickstart.command)
    app.command("train")(train.command)
    app.command("convert")(convert.command)
    app.add_typer(data.app, name="data")
    app.add_typer(eval.app, name="eval")
    app.command("ablate")(ablate.command)
    app.command("visualize")(visualize.command)
    app.command("serve")(serve.command)
    app.add_typer(bench.app, name="bench")
    app.command("info")(info.command)
    try:
        app()
    except (CheckpointError, ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as ended:
        if ended.code != 130:  # what the command library makes of Ctrl-C
            raise
        print("\nstopped; what was finished is kept, run the same command again to go on", file=sys.stderr)
        sys.exit(1)
