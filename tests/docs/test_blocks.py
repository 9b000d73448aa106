"""Every command and programme that the pages print is run, on a host like the reader's; see blocks.py."""

import re
from collections.abc import Iterator

import pytest

from tests.docs.blocks import PAGES, Block, blocks
from tests.docs.world import World, isolation, world

RUN = [block for page in PAGES for block in blocks(page) if block.mode.startswith("run")]

needs_a_world = pytest.mark.skipif(isolation() is None, reason="this machine does not let us make a network namespace")


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("monitored"), monitor=True) as here:
        yield here


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("lonely"), monitor=False) as here:
        yield here


@needs_a_world
@pytest.mark.parametrize("block", RUN, ids=str)
def test_it_does_what_the_page_says(block: Block, request: pytest.FixtureRequest) -> None:
    here: World = request.getfixturevalue("lonely" if block.mode == "run without a monitor" else "monitored")
    if block.language == "console":
        _check_console(here, block)
        return
    interpreter = ["python", "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    if block.mode.startswith("run until "):
        output = here.run_until([*interpreter, block.text], block.mode.removeprefix("run until "))
    else:
        status, output = here.run([*interpreter, block.text])
        assert status == 0, output
    assert "Traceback" not in output


def _check_console(here: World, block: Block) -> None:
    commands = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert commands.pop(0) == "", "a console begins with a command, after `$ `"
    for each in commands:
        command, _, expected = each.partition("\n")
        while command.endswith("\\"):
            more, _, expected = expected.partition("\n")
            command = command[:-1] + more.removeprefix(">")
        _, output = here.run(["bash", "-c", command])
        assert matches(expected, output), f"$ {command}\n{output}\nbut the page says\n{expected}"


def matches(expected: str, output: str) -> bool:
    """Whether the output is the expected one; `...` stands for any text, also over lines."""
    pattern = ".*".join(re.escape(part) for part in _plain(expected).split("..."))
    return re.fullmatch(pattern, _plain(output), re.DOTALL) is not None


def _plain(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def test_a_wrong_page_would_be_found() -> None:
    assert matches("one\n...\nthree ...\n", "one\ntwo\nthree 3\n")
    assert not matches("one\n", "one\ntwo\n")
    assert not matches("one ... three\n", "one two\n")
