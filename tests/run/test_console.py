"""Who writes which lines where."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import logging
from remax_megatron.console import set_up_logging
set_up_logging(is_first={is_first}, with_information={information})
log = logging.getLogger("remax_megatron.somewhere")
log.info("information"), log.warning("warning"), log.error("error")
"""


@pytest.mark.parametrize(
    ("is_first", "information", "out", "err"),
    [
        (True, True, ["information"], ["warning", "error"]),
        (True, False, [], ["warning", "error"]),
        (False, True, [], ["error"]),
    ],
)
def test_information_to_output_and_warnings_to_error(is_first: bool, information: bool, out: list, err: list) -> None:
    code = SCRIPT.format(is_first=is_first, information=information)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout.split(), done.stderr.split()) == (out, err)
