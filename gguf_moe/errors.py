"""The errors that gguf-moe raises for what a user can mend.

Each message is one line that says what is wrong, where (file, tensor, key), what was found and expected,
and what to do. The command line prints the line and exits with `exit_code`.
"""

from __future__ import annotations


class GgufMoeError(Exception):
    """Input, output or environment is not as it must be."""

    exit_code = 1


class UsageError(GgufMoeError):
    """The call itself asks for something that does not exist or cannot be had."""

    exit_code = 2
