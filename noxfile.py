"""The tests on the oldest torch that is supported and on the newest that is published.

nox                       both, without the long tests
nox -s newest -- -k mlp   one of them, with arguments for pytest
"""

import nox

OLDEST = "2.11"
nox.options.sessions = ["oldest", "newest"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
def oldest(session: nox.Session) -> None:
    """torch 2.11, which ``pyproject.toml`` names as the least."""
    _test(session, f"torch=={OLDEST}.*")


@nox.session
def newest(session: nox.Session) -> None:
    """The newest release that the package index serves."""
    _test(session, "torch", "--upgrade")


def _test(session: nox.Session, torch: str, *options: str) -> None:
    session.install(*options, torch, "-e", ".[dev]")
    session.run("python", "-m", "grapefx")
    tests = session.posargs or ["-m", "not slow", "-n", "auto", "--maxprocesses", "4"]
    session.run("python", "-m", "pytest", *tests, env={"OMP_NUM_THREADS": "1"})
