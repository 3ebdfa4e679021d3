"""The two-column table that the C trainers print at their start. Source: train_gpt2_fp32.cu, main."""

RULE = "+" + "-" * 23 + "+" + "-" * 52 + "+"


def rule() -> None:
    """+-----------------------+----------------------------------------------------+"""
    print(RULE)


def heading() -> None:
    """The table's first three lines."""
    rule()
    row("Parameter", "Value")
    rule()


def row(label: str, value, fmt: str = "%s") -> None:
    """| label padded to 21 | value as `fmt` has it, padded to 50 |; longer ones are printed whole, None as NULL."""
    text = "NULL" if value is None else fmt % (value,)
    print(f"| {label:<21} | {text:<50} |")
