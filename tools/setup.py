#!/usr/bin/env python3
"""Makes the virtual environment from the locked requirements, with the standard library alone.

    python3 tools/setup.py [--dev] [--providers] [--otel] [--venv DIR] [--force]

Any interpreter may run it; Corral itself needs 3.11. It does nothing when DIR was made by the
same Python from the same files, so it may be run before every command.
"""

from __future__ import print_function

import argparse
import hashlib
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MINIMUM = (3, 11)
EXTRAS = ("providers", "otel")
STAMP = ".corral-setup.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dev", action="store_true", help="with what tests and checks need")
    parser.add_argument("--providers", action="store_true", help="with what the optional providers need; this stays")
    parser.add_argument("--otel", action="store_true", help="with what sends traces; this stays too")
    parser.add_argument("--venv", default=os.path.join(ROOT, ".venv"), help="where (default: .venv)")
    parser.add_argument("--force", action="store_true", help="make it anew")
    parser.add_argument("--same-python", action="store_true", help="make it anew if another Python made it")
    options = parser.parse_args()
    if sys.version_info < MINIMUM:
        fail(
            "Corral needs Python %d.%d or newer, and %s is %d.%d."
            % (MINIMUM + (sys.executable,) + tuple(sys.version_info[:2])),
            "Name another one: make PYTHON=python3.12 ...",
        )
    venv = os.path.abspath(options.venv)
    wanted = {"files": digest(), "python": list(sys.version_info[:2])}
    found = read_stamp(venv)
    for extra in EXTRAS:
        setattr(options, extra, getattr(options, extra) or bool(found and found.get(extra)))
    if not options.force and fits(found, wanted, options):
        return
    if options.force or wrong_python(venv, options.same_python):
        say("making %s anew" % venv)
        make_venv(venv, clear=True)
    else:
        make_venv(venv, clear=False)
    install(venv, options)
    wanted["python"] = venv_python(venv) or wanted["python"]
    wanted["dev"] = options.dev
    for extra in EXTRAS:
        wanted[extra] = getattr(options, extra) or options.dev
    with open(os.path.join(venv, STAMP), "w") as stamp:
        json.dump(wanted, stamp)


def digest():
    """One hash over every file that says what is installed."""
    sums = {}
    names = ["pyproject.toml", "tools/setup.py"]
    names += ["requirements/" + name for name in ("bootstrap.txt", "runtime.txt", "dev.txt")]
    names += ["requirements/" + extra + ".txt" for extra in EXTRAS]
    for name in names:
        with open(os.path.join(ROOT, name), "rb") as file:
            sums[name] = hashlib.sha256(file.read()).hexdigest()
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def read_stamp(venv):
    try:
        with open(os.path.join(venv, STAMP)) as stamp:
            return json.load(stamp)
    except (IOError, ValueError):
        return None


def fits(found, wanted, options):
    if not found or found.get("files") != wanted["files"]:
        return False
    if any(getattr(options, name) and not found.get(name) for name in ("dev",) + EXTRAS):
        return False
    return not options.same_python or found.get("python") == wanted["python"]


def venv_python(venv):
    """[major, minor] of the environment's own interpreter, None if there is none that starts."""
    try:
        text = subprocess.check_output(
            [python_of(venv), "-c", "import sys; print(*sys.version_info[:2])"], stderr=subprocess.DEVNULL
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return [int(part) for part in text.split()]


def wrong_python(venv, same_python):
    """Whether an environment is there that cannot be kept."""
    if not os.path.exists(os.path.join(venv, "pyvenv.cfg")):
        return False
    found = venv_python(venv)
    return not found or found < list(MINIMUM) or (same_python and found != list(sys.version_info[:2]))


def make_venv(venv, clear):
    if not clear and venv_python(venv) and run([python_of(venv), "-m", "pip", "--version"], quiet=True) == 0:
        return
    say("making %s with Python %s" % (venv, sys.version.split()[0]))
    command = [sys.executable, "-m", "venv"] + (["--clear"] if clear else []) + [venv]
    if run(command) != 0:
        fail(
            "Python's venv module did not work (what it said is above).",
            "On Debian and Ubuntu: apt-get install python3-venv. Then run the same command again.",
        )


def install(venv, options):
    python = python_of(venv)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    must(pip + ["--require-hashes", "-r", lock("bootstrap")], "installing uv")
    # Compiled now and not at the first start: where Python may not write bytecode, or is told not to
    # (PYTHONDONTWRITEBYTECODE), every start would compile everything anew and take twice as long.
    uv = [python, "-m", "uv", "pip", "install", "--quiet", "--compile-bytecode", "--python", python]
    extras = [extra for extra in EXTRAS if getattr(options, extra)]
    files = [lock(name) for name in (["dev"] if options.dev else extras or ["runtime"])]
    must(uv + ["--require-hashes"] + [part for file in files for part in ("-r", file)], "installing the dependencies")
    must(uv + ["--no-deps", "--no-build-isolation", "--editable", ROOT], "installing Corral")
    run([python, "-m", "compileall", "-q", os.path.join(ROOT, "src")])


def lock(name):
    return os.path.join(ROOT, "requirements", name + ".txt")


def python_of(venv):
    return os.path.join(venv, "bin", "python")


def must(command, what):
    say(what)
    if run(command) != 0:
        fail(
            "%s failed (what it said is above)." % (what[0].upper() + what[1:]), "Run the same command again to retry."
        )


def run(command, quiet=False):
    sink = subprocess.DEVNULL if quiet else None
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "VIRTUAL_ENV")}
    return subprocess.call(command, stdout=sink, stderr=sink, env=environment)


def say(text):
    sys.stderr.write("corral set-up: %s\n" % text)
    sys.stderr.flush()


def fail(what, remedy):
    sys.stderr.write("corral set-up: %s\n  %s\n" % (what, remedy))
    sys.exit(1)


if __name__ == "__main__":
    main()
