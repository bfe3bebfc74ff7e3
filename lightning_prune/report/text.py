"""Numbers as people read them; the same words in the table, in Markdown and in HTML."""

from __future__ import annotations

from collections.abc import Callable

Format = Callable[[float], str]

_THOUSANDS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
# Ratios this near to one are told as "same": no reader acts on half a percent.
_SAME = 0.005


def digits(value: float, count: int = 3) -> str:
    """Return a number with `count` significant digits, a large one with all before the point.

    Example:
        >>> digits(0.012345), digits(1.2), digits(123.4), digits(12345)
        ('0.0123', '1.20', '123', '12345')
    """
    if value == 0:
        return "0"
    if not 1e-6 <= abs(value) < 1e15:
        return f"{value:.{count - 1}e}"
    rounded = float(f"{value:.{count - 1}e}")
    exponent = int(f"{rounded:e}".partition("e")[2])
    return f"{value if exponent >= count else rounded:.{max(count - 1 - exponent, 0)}f}"


def size(value: float) -> str:
    """Return bytes in decimal units.

    Example:
        >>> size(999), size(46_800_000)
        ('999 B', '46.8 MB')
    """
    for scale, letter in _THOUSANDS:
        # What would be rounded up to 1000 of one unit is told as 1.00 of the next.
        if abs(value) >= scale * 0.9995:
            return f"{digits(value / scale)} {'kB' if letter == 'k' else letter + 'B'}"
    return f"{value:.0f} B"


def count(value: float) -> str:
    """Return a count.

    Example:
        >>> count(812), count(11_689_512), count(1.8e9)
        ('812', '11.7 M', '1.80 G')
    """
    for scale, letter in _THOUSANDS:
        if abs(value) >= scale * 0.9995:
            return f"{digits(value / scale)} {letter}"
    return f"{value:.0f}"


def milliseconds(value: float) -> str:
    """Return a duration.

    Example:
        >>> milliseconds(0.0321), milliseconds(12.34)
        ('0.0321 ms', '12.3 ms')
    """
    return f"{digits(value)} ms"


def millijoules(value: float) -> str:
    """Return an energy.

    Example:
        >>> millijoules(1.5)
        '1.50 mJ'
    """
    return f"{digits(value)} mJ"


def metric(value: float) -> str:
    """Return a metric with four decimals, or four significant digits where it is large.

    Example:
        >>> metric(0.98333), metric(12345.678)
        ('0.9833', '12346')
    """
    return f"{value:.4f}" if abs(value) < 100 else digits(value, 4)


def percent(value: float, decimals: int = 1) -> str:
    """Return a fraction in percent.

    Example:
        >>> percent(0.6), percent(0.60012, 2)
        ('60.0 %', '60.01 %')
    """
    return f"{100 * value:.{decimals}f} %"


def difference(value: float) -> str:
    """Return a signed difference.

    Example:
        >>> difference(-0.0031), difference(0.0)
        ('-0.0031', '±0')
    """
    text = metric(abs(value))
    if not float(text):
        return "±0"
    return f"{'+' if value > 0 else '-'}{text}"


def factor(value: float) -> str:
    """Return a factor.

    Example:
        >>> factor(2.0), factor(35.2)
        ('2.00x', '35.2x')
    """
    return f"{digits(value)}x"


def ratio(baseline: float, value: float, better: str, worse: str) -> str:
    """Say in words how a value that should be low compares to the baseline.

    Args:
        baseline: The baseline's value, positive.
        value: The value, positive.
        better: The word for less, such as `"smaller"`.
        worse: The word for more, such as `"larger"`.

    Returns:
        A few words; empty if there is nothing to compare.

    Example:
        >>> [ratio(10, value, "faster", "slower") for value in (4, 10, 25)]
        ['2.50x faster', 'same', '2.50x slower']
    """
    if baseline <= 0 or value <= 0:
        return ""
    if abs(baseline / value - 1) < _SAME:
        return "same"
    return (
        f"{factor(baseline / value)} {better}" if value < baseline else f"{factor(value / baseline)} {worse}"
    )
