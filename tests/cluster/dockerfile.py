"""What holds of a Dockerfile and its .dockerignore, as far as it can be told without building."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.files import SECRET_NAME, is_pinned

Instruction = tuple[str, str]


def instructions(text: str) -> list[Instruction]:
    """Returns names and arguments of a Dockerfile's instructions, each on one line."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    split = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, arguments) for name, arguments in split]


def faults(text: str, ignore: str, root: Path) -> list[str]:
    """Lists what is wrong or careless in a Dockerfile.

    Args:
        text: the Dockerfile.
        ignore: the .dockerignore.
        root: of the checkout, from which it is built.
    """
    found = instructions(text)
    users = [arguments for name, arguments in found if name == "USER"]
    problems = [*_names(found), *_installs(found), *_copies(found, ignore, root)]
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        problems.append("runs as root, or as a user that Kubernetes cannot tell from root")
    return problems


def _names(found: list[Instruction]) -> Iterator[str]:
    defaults = dict(
        arguments.split("=", 1) for name, arguments in found if name == "ARG" and "=" in arguments
    )
    for name, arguments in found:
        if name in ("ARG", "ENV"):
            for variable in re.findall(r"(?:^|\s)(\w+)(?==|$)", arguments):
                if SECRET_NAME.search(variable):
                    yield f"{variable} would stay in the image"
        if name == "FROM":
            image = arguments.split()[0]
            for variable, value in defaults.items():
                image = image.replace(f"${{{variable}}}", value)
            if not is_pinned(image):
                yield f"{image} is of any version"


def _installs(found: list[Instruction]) -> Iterator[str]:
    for name, arguments in found:
        for command in arguments.split("&&") if name == "RUN" else ():
            if "pip install" not in command:
                continue
            local = "--no-deps" in command and command.rstrip().endswith(" .")
            if not local and not {"--require-hashes", "--compile"} <= set(shlex.split(command)):
                yield f"installs what nobody has seen, or without byte code:{command}"


def _copies(found: list[Instruction], ignore: str, root: Path) -> Iterator[str]:
    copied: list[str] = []
    for name, arguments in found:
        if name not in ("COPY", "ADD") or "--from=" in arguments:
            continue
        *sources, _ = [part for part in arguments.split() if not part.startswith("--")]
        for source in sources:
            copied.append(source)
            if not (root / source).exists():
                yield f"{source} is not there"
            elif ignored(source, ignore):
                yield f"{source} is ignored"
    if copied[:1] != ["requirements.txt"]:
        yield "code is copied before packages are installed"


def ignored(path: str, ignore: str) -> bool:
    """Whether a .dockerignore keeps a path from the builder; the last pattern that fits decides.

    Args:
        path: from the root of the checkout.
        ignore: the .dockerignore.
    """
    parts = path.split("/")
    ancestors = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    result = False
    for line in ignore.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        fits = _expression(pattern.removeprefix("!").rstrip("/"))
        if any(fits.fullmatch(ancestor) for ancestor in ancestors):
            result = not pattern.startswith("!")
    return result


def _expression(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*/|\*|\[[^]]*\])", pattern)
    known = {"**/": "(?:.*/)?", "*": "[^/]*"}
    expressions = [
        known.get(part, part if part.startswith("[") else re.escape(part)) for part in parts
    ]
    return re.compile("".join(expressions))
