"""What people see: both sides show it in one way, which is `protocol/console.py`."""

from protocol.console import ProgressLine, next_step, print_error, print_json, print_lines, print_table, say, show

__all__ = ["ProgressLine", "next_step", "print_error", "print_json", "print_lines", "print_table", "say", "show"]
