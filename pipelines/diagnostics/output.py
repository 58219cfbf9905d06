"""Whether the driver and every node can read and write the output, and see each other's files."""

from collections.abc import Sequence
from typing import Literal

import ray

from pipelines.core.storage import join, read_bytes, remove, replacing
from pipelines.diagnostics.finding import Finding, fail, ok
from pipelines.diagnostics.nodes import Answer, Node, all_of, ask
from pipelines.diagnostics.reasons import reason
from pipelines.diagnostics.scratch import scratch

CHECK = "storage"
_DRIVER = "driver"
_CONTENT = b"what the driver wrote"

Seen = Literal["yes", "no", "other content"]


def exchange(folder: str) -> Seen:
    """On a node: reads what the driver wrote, and writes a file named after the node.

    Args:
        folder: path or URI.

    Returns:
        Whether the driver's file is there; only then one is written.
    """
    try:
        content = read_bytes(join(folder, _DRIVER))
    except FileNotFoundError:
        return "no"
    if content != _CONTENT:
        return "other content"
    with replacing(join(folder, _here())) as stream:
        stream.write(_content(_here()))
    return "yes"


def take_away(folder: str) -> None:
    """On a node: removes what `exchange` wrote there and the driver does not see.

    Args:
        folder: path or URI.
    """
    remove(join(folder, _here()))


def _here() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _content(node_id: str) -> bytes:
    return f"what {node_id} wrote".encode()


def check_output(output: str, nodes: Sequence[Node], *, seconds: float) -> list[Finding]:
    """Has the driver and the nodes write files, and read each other's.

    Args:
        output: absolute path or URI.
        nodes: of the cluster.
        seconds: to wait for them.
    """
    try:
        with scratch(output) as folder:
            with replacing(join(folder, _DRIVER)) as stream:
                stream.write(_CONTENT)
            if read_bytes(join(folder, _DRIVER)) != _CONTENT:
                return [fail(CHECK, f"What is written to {output} is read as something else.")]
            answers = ask(nodes, exchange, folder, seconds=seconds)
            wrote = [answer.node for answer in answers if answer.value == "yes"]
            unseen = [node for node in wrote if not _sees(folder, node)]
            ask(unseen, take_away, folder, seconds=seconds)
            return judge(output, answers, unseen) or [ok(CHECK, _well(output, len(nodes)))]
    except (OSError, ValueError) as error:
        return [fail(CHECK, _refused("The driver", output, reason(error)))]


def _sees(folder: str, node: Node) -> bool:
    try:
        return read_bytes(join(folder, node.id)) == _content(node.id)
    except FileNotFoundError:
        return False


def judge(output: str, answers: Sequence[Answer[Seen]], unseen: Sequence[Node]) -> list[Finding]:
    """Tells what is wrong.

    Args:
        output: path or URI.
        answers: what `exchange` returned on the nodes.
        unseen: nodes whose files the driver does not see.

    Returns:
        Failures; none if all is well.
    """
    findings = []
    for answer in answers:
        name = answer.node.name
        if answer.error:
            findings.append(fail(CHECK, _refused(name, output, answer.error)))
        elif answer.value == "no":
            text = f"{name} does not see what the driver wrote to {output}"
            findings.append(fail(CHECK, f"{text}: {_apart(output)}"))
        elif answer.value != "yes":
            text = f"{name} reads something else in {output} than the driver wrote: two machines "
            findings.append(fail(CHECK, f"{text}mount different storage there. Mount the same."))
    for node in unseen:
        text = f"The driver does not see what {node.name} wrote to {output}: {_apart(output)}"
        findings.append(fail(CHECK, text))
    return findings


def _apart(output: str) -> str:
    if "://" in output:
        return "they reach different stores. Compare endpoint and credentials of the two."
    return (
        "it is not shared by the machines. Give --output a folder that all of them mount, or the "
        "URI of an object store (s3://...)."
    )


def _refused(who: str, output: str, why: str) -> str:
    advice = (
        "Correct --output, or set the credentials of the object store in the environment of the "
        "driver and of every node"
        if "://" in output
        else "Give --output a folder that can be written"
    )
    return f"{who} cannot read and write {output} ({why}). {advice}."


def _well(output: str, nodes: int) -> str:
    if not nodes:
        return f"{output}: the driver reads what it writes."
    return f"{output}: the driver and {all_of(nodes)} see each other's files."
