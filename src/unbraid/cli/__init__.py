"""The command line: one file a verb.

A verb is a module with `Options`, a frozen dataclass (a union of them for a verb with verbs of its own), and
`run(options)`, whose result is the exit code (None is 0). To add a verb, write the module and add its line to
`VERBS`. Nothing heavier than the standard library is imported before a verb is chosen.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import NamedTuple

from unbraid.manifest.errors import IntegrityError, UserError

TRACEBACK = "UNBRAID_TRACEBACK"
_HELP = 8
"""Spaces before the help of an option in what tyro says of it."""


class Verb(NamedTuple):
    """Where a verb lives and what it does, in one line."""

    module: str
    """Module with the verb's `Options` and `run`."""
    help: str
    """What it does, for the list of verbs."""


VERBS: dict[str, Verb] = {
    "demo": Verb(
        "unbraid.cli.demo", "the whole story on one model: find the feature, prove it, guard against it"
    ),
    "capture": Verb("unbraid.cli.capture", "read a model's activations on a corpus into shards on disk"),
    "import": Verb("unbraid.cli.importing", "bring activations that another tool wrote into shards on disk"),
    "train": Verb("unbraid.cli.train", "train a sparse autoencoder on activations"),
    "finetune": Verb("unbraid.cli.finetune", "train an autoencoder further on what it does to the model"),
    "sweep": Verb("unbraid.cli.sweep", "train many autoencoders at once and compare them on held-out text"),
    "evaluate": Verb("unbraid.cli.evaluate", "measure an autoencoder: reconstruction, sparsity, behaviour"),
    "index": Verb("unbraid.cli.index", "say what every latent does over a corpus"),
    "label": Verb("unbraid.cli.label", "say what latents mean, score the labels, and review them"),
    "find": Verb("unbraid.cli.find", "find the latents that separate two sets of documents"),
    "search": Verb("unbraid.cli.search", "search an index by words, meaning, a text, a direction or numbers"),
    "structure": Verb(
        "unbraid.cli.structure", "kinds of latents, clusters, opposites, a map, and what a wider SAE splits"
    ),
    "export": Verb("unbraid.cli.export", "write an index as files of Neuronpedia, SAEDashboard or delphi"),
    "validate": Verb("unbraid.cli.validate", "edit latents and measure what that changes, beside controls"),
    "browse": Verb(
        "unbraid.cli.browse", "look at indexes, findings and labels in a browser; try text, steer"
    ),
    "convert": Verb(
        "unbraid.cli.convert", "bring another tool's autoencoder in, or take one to another tool"
    ),
    "push": Verb("unbraid.cli.push", "send an autoencoder to the Hugging Face Hub, in private by default"),
    "practice": Verb(
        "unbraid.cli.practice", "train the practice assistant, verify its card, write its conversations"
    ),
    "verify": Verb("unbraid.cli.verify", "check every artifact below a folder, and what each was made from"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 2 for the user's mistake, 1 for a failed run, else 0.

    `args` are the words after `unbraid`; None takes them from the process. Errors are one line on stderr;
    setting UNBRAID_TRACEBACK=1 shows where an unexpected one came from.
    """
    words = list(sys.argv[1:] if args is None else args)
    # OpenMP's threads spin while they wait for each other: where anything else runs on the processor, a
    # step then takes ten times as long (benchmarks/RESULTS.md, "training: beside another process").
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = _dispatch(words)
        sys.stdout.flush()  # a reader that has left is noticed here and not while Python shuts down
        return code
    except UserError as error:
        return _complain(error, 2)
    except IntegrityError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        _say("stopped; run the same command again to go on")
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _complain(error, 1, f"{place}{error.strerror or error}")
    except Exception as error:
        return _complain(error, 1, f"{type(error).__name__}: {error} (set {TRACEBACK}=1 to see where)")


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if words else 2
    if words[0] == "--version":
        from unbraid import __version__

        print(f"unbraid {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        advice = f"did you mean {near[0]}?" if near else "`unbraid --help` lists the verbs"
        raise UserError(f"there is no verb {name!r}; {advice}")
    return _run(name, rest)


def _run(name: str, rest: list[str]) -> int:
    """Read a verb's options with tyro and run it."""
    import tyro

    from unbraid.cli.repeated import together

    verb = VERBS[name]
    module = importlib.import_module(verb.module)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = tyro.cli(
                module.Options,
                prog=f"unbraid {name}",
                description=verb.help[0].upper() + verb.help[1:] + ".",
                args=together(rest, module.Options),
                config=(
                    tyro.conf.OmitArgPrefixes,  # --model, not --options.model
                    tyro.conf.FlagCreatePairsOff,  # --json alone, no --no-json
                    tyro.conf.PositionalMetavarFromFieldName,
                ),
            )
    except SystemExit as leaving:  # tyro has shown its help (0) or said what is wrong with the options (2)
        if leaving.code in (None, 0):
            return 0
        raise UserError(_sentence(said.getvalue())) from None
    sys.stderr.write(said.getvalue())
    _check_seeds(options)
    return module.run(options) or 0


def _check_seeds(options: object) -> None:
    """Raise UserError for a seed that no generator takes, in the options or in options of theirs."""
    for name, value in vars(options).items():
        if name == "seed":
            for seed in value if isinstance(value, tuple) else (value,):
                if seed is not None and not 0 <= seed < 2**63:
                    raise UserError(f"seed is {seed}; choose --seed of 0 or more, below 2 to the 63rd")
        elif is_dataclass(value):
            _check_seeds(value)


def _sentence(box: str) -> str:
    """What tyro says in a box of several parts, in a line, without the help of the options that it names."""
    parts = [""]
    for line in box.splitlines()[1:]:  # below the title
        inside = line[1:].rstrip("│ ")  # without its edges, which only some terminals get
        text = inside.strip()
        if not text.strip("─-╯"):
            parts.append("")  # a rule between two parts, or the lower edge
        elif len(inside) - len(text) < _HELP:
            parts[-1] = f"{parts[-1]} {text}".lstrip()
    *told, last = [part.rstrip(".:") for part in parts if part and not part.startswith("Argument helptext")]
    return "; ".join([*told, f"`{last[last.index('unbraid') :]}` shows the options"])


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: unbraid VERB [options]",
            "",
            "Unbraid a language model's activations into features you can read, test and control.",
            "",
            *lines,
            "",
            "`unbraid VERB --help` shows the options of a verb.",
        ]
    )


def _complain(error: BaseException, code: int, message: str | None = None) -> int:
    if os.environ.get(TRACEBACK) == "1":
        import traceback

        traceback.print_exception(error)
    _say(message or str(error))
    return code


def _say(message: str) -> None:
    print("unbraid: " + " ".join(message.split()), file=sys.stderr)
