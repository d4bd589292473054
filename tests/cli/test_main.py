"""The command line's manners: exit codes, one-line errors, and a quick start."""

from __future__ import annotations

import subprocess
import sys
import types
from dataclasses import dataclass

import pytest

import unbraid
from unbraid import cli
from unbraid.manifest.errors import IntegrityError, UserError


@dataclass(frozen=True)
class Nothing:
    """No options."""


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch):
    """Add a verb `try` whose `run` and options are given by the test."""

    def add(run, options=Nothing) -> None:
        module = types.ModuleType("unbraid_try")
        module.run, module.Options = run, options
        monkeypatch.setitem(sys.modules, "unbraid_try", module)
        monkeypatch.setitem(cli.VERBS, "try", cli.Verb("unbraid_try", "try something"))

    return add


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            UserError("k is 9 but\nthe SAE has 4 latents; choose a smaller --k"),
            2,
            "unbraid: k is 9 but the SAE has",
        ),
        (IntegrityError("sae/w was changed"), 1, "unbraid: sae/w was changed"),
        (OSError(28, "the disk is full", "out/shard"), 1, "unbraid: out/shard: the disk is full"),
        (RuntimeError("out of memory"), 1, "unbraid: RuntimeError: out of memory (set UNBRAID_TRACEBACK=1"),
        (KeyboardInterrupt(), 130, "unbraid: stopped"),
    ],
)
def test_every_error_is_one_line_with_its_exit_code(
    verb, capsys, error: BaseException, code: int, line: str
) -> None:
    def run(_) -> None:
        raise error

    verb(run)
    assert cli.main(["try"]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(line) and printed.err.count("\n") == 1


def test_the_traceback_can_be_seen(verb, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_) -> None:
        raise RuntimeError("deep down")

    verb(run)
    monkeypatch.setenv(cli.TRACEBACK, "1")
    assert cli.main(["try"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_options_are_read_and_the_exit_code_is_what_run_returns(verb) -> None:
    seen = []
    verb(lambda options: seen.append(options) or 3, Train)
    assert cli.main(["try", "--width", "8", "--json"]) == 3
    assert seen == [Train(8, True)]


@dataclass(frozen=True)
class Train:
    """Train it."""

    width: int
    """How wide."""
    json: bool = False
    """Whether to print JSON."""


@dataclass(frozen=True)
class Check:
    """Check it."""


@dataclass(frozen=True)
class Inner:
    seed: tuple[int, ...] = (0,)
    """Seeds."""


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    """Options within options."""


@pytest.mark.parametrize("seed", ["-1", str(2**63)])
def test_a_seed_that_no_generator_takes_is_refused(verb, capsys, seed: str) -> None:
    verb(lambda options: None, Outer)
    assert cli.main(["try", "--seed", "1", "2"]) == 0
    assert cli.main(["try", "--seed", "1", seed]) == 2
    assert f"seed is {seed}; choose --seed of 0 or more" in capsys.readouterr().err


def test_a_verb_may_have_verbs_of_its_own(verb, capsys) -> None:
    seen = []
    verb(seen.append, Train | Check)
    assert cli.main(["try", "train", "--width", "8"]) == 0
    assert cli.main(["try", "check"]) == 0
    assert seen == [Train(8), Check()]
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == (
        "unbraid: Expected one of {train, check}; `unbraid try --help` shows the options\n"
    )
    assert cli.main(["try", "train"]) == 2
    assert capsys.readouterr().err == (
        "unbraid: Missing from unbraid try train: --width INT; `unbraid try train --help` shows the options\n"
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--widht", "8"], "Missing from unbraid try: --width INT; Unrecognized options: --widht 8"),
        (["--width", "8", "no", "--where"], "Unrecognized options: no, --where"),
        (["--width"], "Missing value for argument '--width'. Expected 1 values"),
        (["--width", "x"], "Error parsing --width: invalid literal for int() with base 10: 'x'"),
    ],
)
@pytest.mark.parametrize("columns", ["50", "200"])
def test_wrong_options_are_one_line_and_exit_with_two(
    verb, capsys, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    verb(lambda _: None, Train)
    assert cli.main(["try", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"unbraid: {told}; `unbraid try --help` shows the options\n"


def test_an_unknown_verb_is_named_with_the_nearest(capsys) -> None:
    assert cli.main(["verfy"]) == 2
    assert capsys.readouterr().err == "unbraid: there is no verb 'verfy'; did you mean verify?\n"
    assert cli.main(["zzzzzz"]) == 2


def test_help_lists_every_verb_and_each_verb_has_its_own(capsys) -> None:
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name, verb in cli.VERBS.items():
        assert f"  {name} " in listed and verb.help in listed
        assert cli.main([name, "--help"]) == 0
        assert f"usage: unbraid {name}" in capsys.readouterr().out


def test_no_verb_is_the_users_mistake(capsys) -> None:
    assert cli.main([]) == 2
    assert "usage: unbraid" in capsys.readouterr().out


def test_version(capsys) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"unbraid {unbraid.__version__}\n"


def test_help_starts_without_heavy_imports() -> None:
    code = (
        "import sys; from unbraid.cli import main; main(['--help']);"
        "print([m for m in ('torch', 'numpy', 'tyro', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves_is_no_crash(lines: int) -> None:
    code = (
        "import dataclasses, sys, time, types; from unbraid import cli\n"
        f"def run(_): time.sleep(0.3); print('line\\n' * {lines})\n"
        "sys.modules['m'] = types.SimpleNamespace(run=run, Options=dataclasses.make_dataclass('None_', []))\n"
        "cli.VERBS['try'] = cli.Verb('m', 'try')\n"
        "sys.exit(cli.main(['try']))\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
