"""`tailora playground --url URL`: a page that compares two models of a server side by side."""

from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import Port

from tailora.cli.main import print_text, stdout
from tailora.errors import require_packages

Url = Annotated[str, Parameter(help="address of an OpenAI-compatible server, such as http://127.0.0.1:8000")]


def playground(*, url: Url, port: Annotated[Port, Parameter(help="of the page, on this machine alone")] = 8080) -> int:
    """Compare two models of a server side by side, in the browser.

    The page shows answers of two adapters, or of an adapter and its base, to the same prompt with the same seed, how
    the log-probabilities of their tokens differ, and counts blind votes, which it saves as preference rows. The page
    of `tailora serve` itself is at the address of the server.
    """
    require_packages("fastapi", "uvicorn", "httpx", extra="serve")
    import uvicorn

    from tailora.serve.playground import playground_app

    app = playground_app(url)
    print_text(stdout(), f"The page is at http://127.0.0.1:{port}; stop it with Ctrl-C.")
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
    return 0
