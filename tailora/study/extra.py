"""Studies need packages that training does not: the extras `study` and `eval`."""

from importlib.util import find_spec

from tailora.errors import ConfigError


def need(*packages: str, extra: str = "study") -> None:
    """Raises ConfigError when one of these is not installed."""
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ConfigError(f"this needs {', '.join(missing)}, which is not installed: pip install 'tailora[{extra}]'")
